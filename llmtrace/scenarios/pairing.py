"""The same requests in several arms, side by side, and what a difference between arms allows to conclude."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from llmtrace.scenarios.facts import Served
from llmtrace.stats import Interval

Conclusion = Literal["improvement", "not supported", "regression"]


def by_pair(served: Iterable[Served]) -> dict[str, dict[str, Served]]:
    """The requests that gave a first token, by pair id and arm, in the order of pair ids."""
    pairs: dict[str, dict[str, Served]] = {}
    for s in served:
        if not s.failed and s.ttft_ms is not None:
            pairs.setdefault(s.pair_id, {})[s.arm] = s
    return dict(sorted(pairs.items()))


def cluster(served: Served) -> tuple[int, str]:
    """Requests that are not independent: those of one tenant in one block share a cache."""
    return served.block, served.tenant


def conclude(saved: Interval) -> Conclusion:
    """From the interval of a saving: an improvement when it lies above zero, a regression when below."""
    if not saved.excludes(0.0):
        return "not supported"
    return "improvement" if saved.estimate > 0 else "regression"
