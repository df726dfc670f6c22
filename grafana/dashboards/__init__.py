"""The dashboards. Each module has a ``BOARD``; a further module is a further dashboard."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from grafana.board import Board


def boards() -> list[Board]:
    """All dashboards, in the order of their modules' names."""
    found = [import_module(f"{__name__}.{module.name}").BOARD for module in iter_modules(__path__)]
    return [board for board in found if isinstance(board, Board)]
