"""Wrapping vLLM's functions so that nothing here can hurt a request.

All code of this plugin that runs inside vLLM runs through one :class:`Guard`. The first exception switches the plugin
off for this process, with one log line; from then on the wrapped functions are called directly. vLLM's own exceptions
pass untouched.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

logger = logging.getLogger("vllm.llmtrace.engine")
"""A child of vLLM's logger, so that lines appear where and how vLLM's do."""

Before = Callable[..., Any]
"""Called with the arguments of the wrapped function; what it returns is handed to the after part."""
After = Callable[..., None]
"""Called with what the before part returned, the result, and the arguments of the wrapped function."""

WRAPPED = "__llmtrace_wrapped__"
"""Set on what replaces a function of vLLM."""


class Switch(Protocol):
    """Whether something is wanted now."""

    on: bool


class Guard:
    """Runs the plugin's code; on the first fault switches all of it off. ``gives`` is what there is no more of then."""

    def __init__(self, gives: str = "engine spans") -> None:
        self.on = True
        self._gives = gives
        self._lock = threading.Lock()
        self._cleanups: list[Callable[[], None]] = []

    def run(self, where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``; None if it fails."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self._off(where, error)
            return None

    def on_off(self, cleanup: Callable[[], None]) -> None:
        """Have ``cleanup`` called when the plugin is switched off: nothing of a request may be kept."""
        self._cleanups.append(cleanup)

    def _off(self, where: str, error: Exception) -> None:
        with self._lock:
            if not self.on:
                return
            self.on = False
            cleanups, self._cleanups = self._cleanups, []
        for cleanup in cleanups:
            try:
                cleanup()
            except Exception:
                logger.debug("llmtrace: cleaning up failed", exc_info=True)
        # The traceback's text could hold parts of a request, the type and the place cannot.
        logger.error("llmtrace: fault in %s (%s); no more %s from this process", where, _place(error), self._gives)


def wrap(
    owner: Any,
    name: str,
    guard: Guard,
    before: Before | None = None,
    after: After | None = None,
    switch: Switch | None = None,
) -> None:
    """Replace function ``name`` of a class or module by one that also runs ``before`` and ``after``.

    A second time does nothing. The function's own exception skips ``after`` and reaches the caller as it is. With a
    ``switch``, both run only for calls that begin and end while it is on; others cost one look at it.
    """
    wanted = switch or guard
    original = getattr(owner, name)
    if getattr(original, WRAPPED, False):
        return
    where = f"{owner.__name__}.{name}"

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not wanted.on or not guard.on:
            return original(*args, **kwargs)
        state = guard.run(where, before, *args, **kwargs) if before is not None else None
        result = original(*args, **kwargs)
        if after is not None and wanted.on and guard.on:
            guard.run(where, after, state, result, *args, **kwargs)
        return result

    setattr(wrapper, WRAPPED, True)
    setattr(owner, name, wrapper)


def _place(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return type(error).__name__
    code = traceback.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name}, line {traceback.tb_lineno}"
