"""Statistics of paired measurements."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES = 10_000


class Interval(BaseModel):
    """An estimate with its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True)
    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside of the interval."""
        return value < self.low or value > self.high


class Distribution(BaseModel):
    """Mean, median and 95th percentile of n values."""

    model_config = ConfigDict(frozen=True)
    n: int
    mean: float
    p50: float
    p95: float


def distribution(values: Sequence[float]) -> Distribution | None:
    """Summary of the values (percentiles by linear interpolation); None of no values."""
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return Distribution(n=len(values), mean=float(np.mean(values)), p50=float(p50), p95=float(p95))


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    statistic: Callable[[NDArray[np.float64]], float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap that draws whole clusters with replacement.

    Values of one cluster are not independent (the requests of one tenant in one block share a cache), so a
    bootstrap over single values would promise too narrow an interval. With every value a cluster of its own
    this is the plain bootstrap. Raises ValueError with fewer than two clusters.
    """
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    if len(groups) < 2:
        raise ValueError("a bootstrap needs at least two clusters")
    arrays = [np.asarray(group, dtype=np.float64) for group in groups.values()]
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(arrays), size=(resamples, len(arrays)))
    resampled = [statistic(np.concatenate([arrays[i] for i in draw])) for draw in draws]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(estimate=statistic(np.concatenate(arrays)), low=float(low), high=float(high))
