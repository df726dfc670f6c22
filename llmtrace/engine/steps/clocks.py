"""Two clocks for the phases of a step: the processor's, and a CUDA device's.

A mark is a moment. On CUDA it is an event on the current stream, which costs the host a few microseconds and the device
nothing; its time is known when the device has come to it, and nobody waits for that.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

_NS_PER_MS = 1_000_000.0


class Clock(Protocol):
    """Where marks come from."""

    def mark(self) -> Any:
        """This moment."""

    def passed(self, mark: Any) -> bool:
        """Whether it has come, so that its time can be told."""

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks that have come."""


class HostClock:
    """The processor's, for models that run on it."""

    def mark(self) -> int:
        """This moment, nanoseconds."""
        return time.perf_counter_ns()

    def passed(self, mark: int) -> bool:
        """Always."""
        return True

    def ms(self, start: int, end: int) -> float:
        """Milliseconds between two marks."""
        return (end - start) / _NS_PER_MS


class CudaClock:
    """A CUDA device's. ``cuda`` is ``torch.cuda``."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def mark(self) -> Any:
        """An event on the current stream."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        """Whether the device has come to it; asks, and does not wait."""
        return bool(mark.query())

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events."""
        return float(start.elapsed_time(end))
