from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrace.stats import ClusterMeans, cluster_bootstrap, distribution, mean_interval, simultaneous_bounds


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_distribution() -> None:
    found = distribution([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert (found.n, found.mean, found.p50) == (4, 2.5, 2.5)
    assert found.p95 == pytest.approx(3.85)
    assert distribution([]) is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 5))
def test_the_interval_lies_within_the_values_and_repeats_by_seed(values: list[float], seed: int) -> None:
    first = cluster_bootstrap(values, range(len(values)), mean, seed=seed, resamples=200)
    again = cluster_bootstrap(values, range(len(values)), mean, seed=seed, resamples=200)
    assert first == again
    assert min(values) - 1e-6 <= first.low <= first.high <= max(values) + 1e-6
    assert first.estimate == pytest.approx(np.mean(values), abs=1e-6)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for n in range(100):
        found = cluster_bootstrap(list(rng.normal(5.0, 2.0, 40)), range(40), mean, seed=n, resamples=400)
        covered += not found.excludes(5.0)
    assert 88 <= covered <= 99


def test_twelve_clusters_seldom_show_a_difference_that_is_not_there() -> None:
    rng = np.random.default_rng(4)
    clusters = [n // 3 for n in range(36)]
    false = 0
    for n in range(100):
        values = rng.normal(0.0, 1.0, 12).repeat(3) + rng.normal(0.0, 1.0, 36)
        false += cluster_bootstrap(list(values), clusters, mean, seed=n, resamples=400).excludes(0.0)
    assert false <= 15


def test_clusters_widen_the_interval_of_values_that_go_together() -> None:
    values = [float(v) for cluster in (1, 5, 9, 2, 7, 4) for v in [cluster] * 10]
    clusters = [c for c in range(6) for _ in range(10)]
    single = cluster_bootstrap(values, range(60), mean)
    whole = cluster_bootstrap(values, clusters, mean)
    assert whole.high - whole.low > 2 * (single.high - single.low)


def test_one_cluster_is_too_few() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        cluster_bootstrap([1.0, 2.0], ["a", "a"], mean)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-1e3, 1e3)), min_size=2, max_size=30), st.integers(0, 5))
def test_means_of_clusters_are_those_of_the_general_bootstrap(values: list[tuple[int, float]], seed: int) -> None:
    clusters, numbers = [c for c, _ in values], [v for _, v in values]
    fast = mean_interval(numbers, clusters, seed=seed)
    if len(set(clusters)) < 2:
        assert fast is None
        return
    assert fast is not None
    slow = cluster_bootstrap(numbers, clusters, mean, seed=seed)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((slow.estimate, slow.low, slow.high), abs=1e-6)


def test_means_of_several_columns_at_once() -> None:
    clusters = ["a", "a", "b", "c"]
    means = ClusterMeans(clusters, seed=1, resamples=500)
    columns = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [9.0, 5.0]])
    first, second = means.intervals(means.sums(columns))
    assert first == means.interval(means.sums(columns[:, 0]))
    assert (second.low, second.estimate, second.high) == (5.0, 5.0, 5.0)


def test_the_best_of_many_means_is_seldom_taken_for_more_than_it_is() -> None:
    rng = np.random.default_rng(5)
    claimed = alone = 0
    for n in range(60):
        values = rng.normal(0.0, 1.0, (40, 30))
        means = ClusterMeans(range(40), seed=n, resamples=500)
        sums = means.sums(values)
        found = values.mean(axis=0)
        lower, upper = simultaneous_bounds(found, means.resampled(sums) - found, 97.5)
        assert (lower <= found).all()
        assert (found <= upper).all()
        claimed += bool((lower > 0).any())
        alone += any(interval.low > 0 for interval in means.intervals(sums))
    assert claimed <= 6
    assert alone >= 20, "bounds of each mean alone would be wrong"


def test_means_that_do_not_vary_are_their_own_bounds() -> None:
    means = np.zeros(3)
    lower, upper = simultaneous_bounds(means, np.zeros((10, 3)), 97.5)
    assert (lower == means).all()
    assert (upper == means).all()
