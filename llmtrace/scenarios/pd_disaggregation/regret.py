"""What other choices would have cost: the same requests in the arms that always and never split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Served
from llmtrace.scenarios.pairing import Conclusion, by_pair, cluster, conclude
from llmtrace.scenarios.pd_disaggregation.arms import ARMS
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.scenarios.pd_disaggregation.rule import Reason
from llmtrace.stats import ClusterMeans, Interval, mean_interval, simultaneous_bounds

Metric = Literal["ttft", "e2e"]
METRICS: tuple[Metric, ...] = ("ttft", "e2e")
MOST_CUTS = 200
"""Thresholds that are tried, of all that would make different choices."""
SAMPLES_OF_EACH = 2000
"""Bootstrap samples with which each threshold is compared with all others."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class ReasonRegret(_Model):
    """The requests of one reason: what their choice lost against the other one, in ms a request.

    Both choices as the forced arms show them for the same requests. The conclusion is "regression" where the interval
    lies above zero: the other choice was better.
    """

    metric: Metric
    reason: Reason | None
    split: bool
    requests: int
    lost_ms: Interval | None
    conclusion: Conclusion


class Cut(_Model):
    """All thresholds (nonCachedTokens) from ``low`` to ``high`` make the same choices; ``high`` None: never split.

    ``mean_ms`` is what a request would have taken; ``above_best`` how much more than with the best cut.
    """

    low: int
    high: int | None
    mean_ms: float
    above_best: Interval


class ThresholdAnswer(_Model):
    """Which threshold would have been best for these requests.

    ``best_low`` to ``best_high`` make the same, best choices. ``low`` to ``high`` is the 95 % bootstrap interval of the
    best threshold, widened by every threshold that the requests do not show to be worse than another; the best one is
    not ``determined`` where that is everything from splitting all requests to splitting none. ``saved_ms`` is what the
    best threshold saves a request against the choices that were made; its interval allows for the best having been
    chosen among many.
    """

    metric: Metric
    configured: int | None
    requests: int
    best_low: int
    best_high: int | None
    low: int
    high: int | None
    determined: bool
    saved_ms: Interval
    conclusion: Conclusion
    curve: list[Cut]


@dataclass(frozen=True)
class Triple:
    """One request as the threshold decided, and the milliseconds that it took split and unified."""

    chosen: Handled
    split_ms: Mapping[Metric, float]
    unified_ms: Mapping[Metric, float]

    def took(self, metric: Metric, *, split: bool) -> float:
        """Milliseconds with this choice."""
        return (self.split_ms if split else self.unified_ms)[metric]

    def lost(self, metric: Metric) -> float:
        """Milliseconds that the choice lost against the other one; negative where it gained."""
        split = self.chosen.was_split
        return self.took(metric, split=split) - self.took(metric, split=not split)


def triples(requests: Iterable[Handled]) -> list[Triple]:
    """The requests that were answered in all three arms, where the forced arms did as they should."""
    by_id = {r.served.trace_id: r for r in requests}
    found = []
    for arms in by_pair(r.served for r in by_id.values()).values():
        if not set(ARMS) <= set(arms):
            continue
        chosen, split, unified = (by_id[arms[arm].trace_id] for arm in ARMS)
        split_ms, unified_ms = _took(split.served), _took(unified.served)
        if split.was_split and not unified.was_split and split_ms and unified_ms:
            found.append(Triple(chosen, split_ms, unified_ms))
    return found


def _took(served: Served) -> dict[Metric, float]:
    """Both metrics, or nothing."""
    if served.ttft_ms is None or served.e2e_ms is None:
        return {}
    return {"ttft": served.ttft_ms, "e2e": served.e2e_ms}


def reason_regrets(found: Sequence[Triple], seed: int) -> list[ReasonRegret]:
    """For each reason and metric what its choices lost."""
    groups: dict[tuple[Reason | None, bool], list[Triple]] = {}
    for t in found:
        groups.setdefault((t.chosen.choice.reason, t.chosen.was_split), []).append(t)
    return [
        _reason_regret(metric, reason, split, group, seed)
        for metric in METRICS
        for (reason, split), group in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0] or ""))
    ]


def _reason_regret(metric: Metric, reason: Reason | None, split: bool, group: list[Triple], seed: int) -> ReasonRegret:
    interval = mean_interval([t.lost(metric) for t in group], [cluster(t.chosen.served) for t in group], seed=seed)
    flipped = (
        None if interval is None else Interval(estimate=-interval.estimate, low=-interval.high, high=-interval.low)
    )
    return ReasonRegret(
        metric=metric,
        reason=reason,
        split=split,
        requests=len(group),
        lost_ms=interval,
        conclusion=conclude(flipped) if flipped else "not supported",
    )


def best_threshold(found: Sequence[Triple], metric: Metric, seed: int) -> ThresholdAnswer | None:
    """The threshold that would have been best; None with too few requests to tell anything."""
    known = [t for t in found if t.chosen.choice.uncached_tokens is not None]
    clusters = [cluster(t.chosen.served) for t in known]
    if len(set(clusters)) < 3:
        return None
    uncached = np.asarray([t.chosen.choice.uncached_tokens for t in known])
    decider = next((t.chosen.choice.decider for t in known if t.chosen.choice.decider), None)
    minimum = decider.minimum_prompt_tokens if decider else 0
    splittable = np.asarray([(t.chosen.choice.prompt_tokens or 0) >= minimum for t in known])
    split, unified = (np.asarray([t.took(metric, split=way) for t in known]) for way in (True, False))
    made = np.asarray([t.chosen.was_split for t in known])

    lows, highs = _cuts(uncached[splittable])
    splits = splittable[:, None] & (uncached[:, None] >= highs[None, :])
    means = ClusterMeans(clusters, seed=seed)
    sums = means.sums(np.where(splits, split[:, None], unified[:, None]))
    curve = sums.sum(axis=0) / len(known)
    best = int(curve.argmin())
    above = means.intervals(sums - sums[:, [best]])
    resampled = means.resampled(sums)
    winners = resampled.argmin(axis=1)
    not_worse = [best, *_not_worse(curve, resampled[:SAMPLES_OF_EACH])]
    low = min(_percentile(lows[winners], 2.5), *lows[not_worse])
    high = max(_percentile(highs[winners], 97.5), *highs[not_worse])
    saved = _saving(means, means.sums(np.where(made, split, unified))[:, None] - sums)
    return ThresholdAnswer(
        metric=metric,
        configured=decider.threshold_tokens if decider else None,
        requests=len(known),
        best_low=int(lows[best]),
        best_high=_tokens(highs[best]),
        low=int(low),
        high=_tokens(high),
        determined=low > lows[0] or not np.isinf(high),
        saved_ms=saved,
        conclusion=conclude(saved),
        curve=[
            Cut(low=int(lows[n]), high=_tokens(highs[n]), mean_ms=float(curve[n]), above_best=above[n])
            for n in range(len(curve))
        ],
    )


def _cuts(uncached: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All thresholds that make different choices, as ranges of the same choices; the last one splits nothing."""
    values = np.unique(uncached[uncached > 0]).astype(np.float64)  # a threshold of 0 has a meaning of its own
    highs = np.append(values, np.inf)
    lows = np.append(1.0, values + 1)
    kept = np.unique(np.linspace(0, len(highs) - 1, min(len(highs), MOST_CUTS)).astype(int))
    return lows[kept], highs[kept]


def _percentile(tokens: NDArray[np.float64], percent: float) -> float:
    """A percentile that is one of the values: some are infinite."""
    return float(np.percentile(tokens, percent, method="inverted_cdf"))


def _tokens(threshold: float) -> int | None:
    return None if np.isinf(threshold) else int(threshold)


def _not_worse(curve: NDArray[np.float64], resampled: NDArray[np.float64]) -> list[int]:
    """The cuts that no other one is shown to be better than."""
    off = resampled - curve
    found = []
    for n in range(len(curve)):
        lower, _ = simultaneous_bounds(curve[n] - curve, off[:, [n]] - off, 97.5)
        if lower.max() <= 0:
            found.append(n)
    return found


def _saving(means: ClusterMeans, sums: NDArray[np.float64]) -> Interval:
    """The largest of several savings, from their sums by cluster."""
    savings = sums.sum(axis=0) / means.counts.sum()
    lower, upper = simultaneous_bounds(savings, means.resampled(sums) - savings, 97.5)
    return Interval(estimate=float(savings.max()), low=float(lower.max()), high=float(upper.max()))
