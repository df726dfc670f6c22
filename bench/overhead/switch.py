"""A vLLM plugin for servers of this bench only: takes llmtrace's hooks out of a running server and puts them back.

Two processes of one program differ by a few percent all their life, by luck; with this, a process is compared with
itself. SIGUSR1 gives vLLM its own functions back, SIGUSR2 wraps them again; the log says so, as ``SAYS`` with ``out``
or ``in``.
"""

from __future__ import annotations

import importlib
import logging
import signal
from functools import reduce
from types import FrameType

SAYS = "overhead bench: hooks "
OUT, IN = signal.SIGUSR1, signal.SIGUSR2

_logger = logging.getLogger("vllm.overhead.bench")
_taken: list[tuple[object, str, object]] = []
"""Owner and name of each wrapped function while it is out, and the function."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    signal.signal(OUT, _out)
    signal.signal(IN, _in)


def _out(_signal: int, _frame: FrameType | None) -> None:
    from llmtrace.engine.compat import HOOKS

    for hook in HOOKS:
        owner = reduce(getattr, hook.owner.split("."), importlib.import_module(hook.module))
        function = getattr(owner, hook.function)
        if hasattr(function, "__llmtrace_wrapped__"):
            _taken.append((owner, hook.function, function))
            setattr(owner, hook.function, function.__wrapped__)
    _logger.info("%sout", SAYS)


def _in(_signal: int, _frame: FrameType | None) -> None:
    while _taken:
        setattr(*_taken.pop())
    _logger.info("%sin", SAYS)
