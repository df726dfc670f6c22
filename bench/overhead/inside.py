"""A vLLM plugin for servers of this bench: takes llmtrace's hooks out of a running server, and times them in it.

Two processes of one program differ by a few percent all their life, by luck: with the hooks out, a process is compared
with itself. SIGUSR1 gives vLLM its own functions back, SIGUSR2 wraps them again; the log says so.

With ``TIMES`` in the environment the hooks stay, and what they add to each function is timed. Code that runs once in
milliseconds is not in the processor's caches, so this is more than what a loop that does nothing else shows.
SIGUSR1 then writes what was measured since the last time into the log.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

TIMES = "OVERHEAD_BENCH_TIMES"
HOOKS_OUT, HOOKS_IN, TOLD = "overhead bench: hooks out", "overhead bench: hooks in", "overhead bench: times "
EVERY_STEP = ("schedule", "update_from_output", "process_outputs")
"""The hooks of every step: two in the engine core, one in the API server."""

_logger = logging.getLogger("vllm.overhead.bench")
_taken: list[tuple[object, str, object]] = []
"""Owner and name of each wrapped function while it is out, and the function."""
_times: dict[str, list[int]] = {}
"""By hook, nanoseconds that each call took beside vLLM's own function."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    if TIMES in os.environ:
        _time_hooks()
        signal.signal(signal.SIGUSR1, _tell)
    else:
        signal.signal(signal.SIGUSR1, _out)
        signal.signal(signal.SIGUSR2, _in)


def _out(_signal: int, _frame: FrameType | None) -> None:
    from llmtrace.engine.compat import HOOKS, owner_of
    from llmtrace.engine.hooks import WRAPPED

    for hook in HOOKS:
        owner = owner_of(hook)
        function = getattr(owner, hook.function)
        if hasattr(function, WRAPPED):
            _taken.append((owner, hook.function, function))
            setattr(owner, hook.function, function.__wrapped__)
    _logger.info(HOOKS_OUT)


def _in(_signal: int, _frame: FrameType | None) -> None:
    while _taken:
        setattr(*_taken.pop())
    _logger.info(HOOKS_IN)


def _time_hooks() -> None:
    from llmtrace.engine import hooks, plugin
    from llmtrace.engine.compat import HOOKS, owner_of

    plugin.install()  # which does nothing where vLLM has loaded it already
    [installed] = plugin._installed  # noqa: SLF001
    for hook in HOOKS:
        if hook.name in EVERY_STEP:
            owner = owner_of(hook)
            clock = _Clock(_times.setdefault(hook.name, []))
            setattr(owner, hook.function, clock.inner(getattr(owner, hook.function).__wrapped__))
            hooks.wrap(owner, hook.function, installed.guard, *installed.bodies()[hook.name])
            setattr(owner, hook.function, clock.outer(getattr(owner, hook.function)))


class _Clock:
    """Times what is between an outer and an inner function."""

    def __init__(self, samples: list[int]) -> None:
        self._samples = samples
        self._inside = 0

    def inner(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            result = function(*args, **kwargs)
            self._inside = time.perf_counter_ns() - began
            return result

        return timed

    def outer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            result = function(*args, **kwargs)
            self._samples.append(time.perf_counter_ns() - began - self._inside)
            return result

        return timed


def _tell(_signal: int, _frame: FrameType | None) -> None:
    told = {name: sorted(samples) for name, samples in _times.items() if samples}
    for samples in _times.values():
        samples.clear()
    _logger.info("%s%s", TOLD, json.dumps({name: _summary(samples) for name, samples in told.items()}))


def _summary(samples: list[int]) -> dict[str, float]:
    """Microseconds. The mean is of all but the longest hundredth: in those, another process had the processor."""
    kept = samples[: max(1, len(samples) * 99 // 100)]
    return {"calls": len(samples), "median": samples[len(samples) // 2] / 1e3, "mean": sum(kept) / len(kept) / 1e3}
