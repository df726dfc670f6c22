"""From the engine's monotonic clock to the wall clock.

vLLM's scheduler stamps its events with ``time.monotonic()`` (seconds); spans need nanoseconds since the epoch. Each
request is converted with one offset, taken once in the process whose monotonic clock it is: durations and order stay
exactly those of the monotonic clock, whatever the wall clock does meanwhile, and another machine's clock never enters.
"""

from __future__ import annotations

from time import monotonic_ns, time_ns

NS_PER_S = 1_000_000_000
_READINGS = 3


def offset_ns() -> int:
    """Nanoseconds to add to this process's monotonic clock to get the time since the epoch.

    The wall clock is read between two readings of the monotonic one; of a few attempts the tightest counts, so that a
    thread switch in between does not become an error.
    """
    best_width = best = 0
    for attempt in range(_READINGS):
        before = monotonic_ns()
        wall = time_ns()
        after = monotonic_ns()
        if attempt == 0 or after - before < best_width:
            best_width, best = after - before, wall - (before + after) // 2
    return best


def wall_ns(monotonic_s: float, offset: int) -> int:
    """``monotonic_s`` (``time.monotonic()``, seconds) as nanoseconds since the epoch, by :func:`offset_ns`."""
    return round(monotonic_s * NS_PER_S) + offset
