"""Files that are reread when they change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from watchfiles import awatch

from llmtrace.errors import UserError

RELOAD_MS = 1000

_log = logging.getLogger(__name__)


async def watch(folder: Path, load: Callable[[], None], otherwise: str) -> None:
    """Call ``load`` on every change in the folder, and every second: what changed before the watch began is no event.

    The folder is watched, for a file may be replaced, or be a link that moves. What ``load`` raises as UserError is
    logged once, with ``otherwise``, which says what stays as it was.
    """
    complaint = ""
    while True:
        try:
            async for _ in awatch(
                folder, debounce=100, step=50, recursive=False, rust_timeout=RELOAD_MS, yield_on_timeout=True
            ):
                complaint = _load(load, otherwise, complaint)
        except OSError as error:
            _log.error("the folder %s cannot be watched (%s); trying again", folder, error.strerror or error)
            await asyncio.sleep(RELOAD_MS / 1000)


def _load(load: Callable[[], None], otherwise: str, complaint: str) -> str:
    try:
        load()
    except UserError as error:
        if str(error) != complaint:
            _log.error("%s; %s", error, otherwise)
        return str(error)
    return ""
