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
    arrays = [np.asarray(group, dtype=np.float64) for group in groups.values()]
    draws = _draws(len(arrays), seed, resamples)
    resampled = [statistic(np.concatenate([arrays[i] for i in draw])) for draw in draws]
    return _interval(statistic(np.concatenate(arrays)), resampled)


class ClusterMeans:
    """The bootstrap of :func:`cluster_bootstrap` for means, all samples at once: many means in little time.

    ``clusters`` has the cluster of each value. Raises ValueError with fewer than two clusters.
    """

    def __init__(self, clusters: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        numbers = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
        self._of_value = np.asarray([numbers[cluster] for cluster in clusters], dtype=np.intp)
        self.counts = np.bincount(self._of_value).astype(np.float64)
        draws = _draws(len(numbers), seed, resamples)
        self._times = np.zeros((resamples, len(numbers)))  # how often each sample holds each cluster
        np.add.at(self._times, (np.arange(resamples)[:, None], draws), 1.0)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of the values (first axis) of each cluster."""
        found = np.zeros((len(self.counts), *values.shape[1:]))
        np.add.at(found, self._of_value, values)
        return found

    def resampled(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean in each sample, from the sums of the clusters."""
        counts = self._times @ self.counts
        means: NDArray[np.float64] = (self._times @ sums) / counts.reshape(-1, *(1,) * (sums.ndim - 1))
        return means

    def interval(self, sums: NDArray[np.float64]) -> Interval:
        """The mean and its interval, from the sums of the clusters."""
        return _interval(float(sums.sum() / self.counts.sum()), self.resampled(sums))

    def intervals(self, sums: NDArray[np.float64]) -> list[Interval]:
        """The same for each column."""
        estimates = sums.sum(axis=0) / self.counts.sum()
        lows, highs = np.percentile(self.resampled(sums), [2.5, 97.5], axis=0)
        rows = zip(estimates, lows, highs, strict=True)
        return [Interval(estimate=float(e), low=float(low), high=float(high)) for e, low, high in rows]


def simultaneous_bounds(
    means: NDArray[np.float64], deviations: NDArray[np.float64], percent: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bounds that hold for all means at once, each side for ``percent`` % of repetitions.

    The best of many means looks better than it is; bounds of each mean alone would not allow for that. ``deviations``
    are those of bootstrap samples (first axis) from ``means``. Source: the studentised reality check (White 2000,
    Romano and Wolf 2005).
    """
    spread = deviations.std(axis=0)
    varying = spread > 1e-9 * (np.abs(means).max() + 1.0)
    if not varying.any():
        return means, means
    scaled = deviations[:, varying] / spread[varying]
    above, below = (np.percentile(side.max(axis=1), percent) for side in (scaled, -scaled))
    return means - above * spread, means + below * spread


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0) -> Interval | None:
    """The mean of the values with its interval; None with fewer than two clusters."""
    if len(set(clusters)) < 2:
        return None
    means = ClusterMeans(clusters, seed=seed)
    return means.interval(means.sums(np.asarray(values, dtype=np.float64)))


def _draws(clusters: int, seed: int, resamples: int) -> NDArray[np.int64]:
    """For each sample the clusters drawn, with replacement."""
    if clusters < 2:
        raise ValueError("a bootstrap needs at least two clusters")
    return np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))


def _interval(estimate: float, resampled: Sequence[float] | NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(estimate=estimate, low=float(low), high=float(high))
