"""The HorizontalPodAutoscaler's algorithm: what Kubernetes documents, and what its controller does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.autoscale.hpa import (
    SCALE_DOWN,
    History,
    Limit,
    Moment,
    Policy,
    Rules,
    Spec,
    Stabilization,
    Target,
    Verdict,
    changed,
    decide,
)

QUEUE = Target(name="queue", value=1)
RUNNING = Target(name="running", value=16)
NOW = 1_800_000_000.0


def spec(**changes: Any) -> Spec:
    return Spec(**{"minimum": 1, "maximum": 10, "targets": (QUEUE,), **changes})


def rules(window_s: float = 0, select: str = "Max", *policies: tuple[str, int, float]) -> Rules:
    made = tuple(Policy(kind=k, value=v, period_s=p) for k, v, p in policies or (("Percent", 100, 15.0),))  # type: ignore[arg-type]
    return Rules(window_s=window_s, select=select, policies=made)  # type: ignore[arg-type]


def verdict(
    told: Spec,
    current: int,
    values: dict[str, float],
    *,
    ready: int | None = None,
    history: History | None = None,
    now: float = NOW,
) -> Verdict:
    return decide(told, history or History(), now, current, current if ready is None else ready, values)[0]


def seen(*recommendations: tuple[float, int]) -> History:
    """Recommendations by how many seconds they are old."""
    return History(recommendations=tuple(Moment(time_s=NOW - age, replicas=n) for age, n in recommendations))


@pytest.mark.parametrize(
    ("target", "current", "ready", "value", "wanted"),
    [
        # AverageValue: ceil(value / target), whatever is ready (GetExternalPerPodMetricReplicas).
        (Target(name="queue", value=1), 1, 1, 3.0, 3),
        (Target(name="queue", value=1), 3, 1, 2.0, 2),
        (Target(name="queue", value=16), 2, 2, 33.0, 2),  # 33 of 32: within 10 %
        (Target(name="queue", value=16), 2, 2, 36.0, 3),
        (Target(name="queue", value=16), 2, 2, 29.0, 2),  # 29 of 32: within 10 %
        (Target(name="queue", value=16), 2, 2, 15.0, 1),
        (Target(name="queue", value=10), 1, 1, 11.0, 1),  # exactly 1.1 is within
        (Target(name="queue", value=10), 1, 1, 11.001, 2),
        (Target(name="queue", value=10), 10, 10, 90.0, 10),  # exactly 0.9 is within
        (Target(name="queue", value=1), 2, 2, 0.0, 0),
        (Target(name="queue", value=1), 1, 1, 0.0009, 0),  # thousandths, cut off
        # Value: ceil(ready * value / target) (GetExternalMetricReplicas).
        (Target(name="queue", kind="Value", value=0.7), 2, 2, 1.4, 4),
        (Target(name="queue", kind="Value", value=0.7), 3, 2, 1.4, 4),  # only what is ready counts
        (Target(name="queue", kind="Value", value=0.7), 2, 2, 0.75, 2),
        (Target(name="queue", kind="Value", value=0.7), 4, 4, 0.35, 2),
    ],
)
def test_what_one_metric_asks_for(target: Target, current: int, ready: int, value: float, wanted: int) -> None:
    assert verdict(spec(targets=(target,)), current, {"queue": value}, ready=ready).recommended == wanted


def test_the_metric_that_asks_for_most_counts() -> None:
    both = spec(targets=(QUEUE, RUNNING))
    found = verdict(both, 1, {"queue": 2.0, "running": 60.0})
    assert (found.recommended, found.metric, found.reason) == (4, "running", "running above target")
    assert found.proposals == {"queue": 2, "running": 4}
    assert verdict(both, 1, {"queue": 4.0, "running": 60.0}).metric == "queue"  # the first of equals


def test_less_than_all_metrics_may_add_but_never_take_away() -> None:
    """Documented: with a metric missing, a scale-down is skipped; a scale-up is still possible."""
    both = spec(targets=(QUEUE, RUNNING))
    assert verdict(both, 2, {"running": 90.0}).desired == 6
    held = verdict(both, 4, {"running": 10.0})
    assert (held.desired, held.recommended, held.reason) == (4, None, "no value of queue")
    assert verdict(both, 4, {}).desired == 4


def test_a_number_outside_of_the_bounds_is_repaired_without_looking_at_metrics() -> None:
    over = verdict(spec(maximum=3), 5, {})
    assert (over.desired, over.limit, over.reason) == (
        3,
        Limit.MAXIMUM,
        "Current number of replicas above Spec.MaxReplicas",
    )
    under = verdict(spec(minimum=2), 1, {})
    assert (under.desired, under.reason) == (2, "Current number of replicas below Spec.MinReplicas")
    assert verdict(spec(), 0, {"queue": 9.0}).desired == 0  # scaling is disabled


@pytest.mark.parametrize(
    ("current", "value", "desired", "limit"),
    [
        (1, 3.0, 3, Limit.NONE),
        (1, 9.0, 5, Limit.UP),  # the default: 4 more or twice as many, whatever is more
        (3, 30.0, 7, Limit.UP),
        (5, 30.0, 10, Limit.MAXIMUM),
        (10, 30.0, 10, Limit.MAXIMUM),  # held at the maximum
        (4, 0.0, 1, Limit.MINIMUM),
        (1, 0.0, 1, Limit.MINIMUM),
        (4, 2.0, 2, Limit.NONE),
    ],
)
def test_bounds_and_default_policies(current: int, value: float, desired: int, limit: Limit) -> None:
    history = seen((400, current))  # old enough not to hold a scale-down back
    found = verdict(spec(), current, {"queue": value}, history=history)
    assert (found.desired, found.limit) == (desired, limit)


@pytest.mark.parametrize(
    ("select", "desired", "limit"), [("Max", 20, Limit.UP), ("Min", 14, Limit.UP), ("Disabled", 10, Limit.UP)]
)
def test_the_policy_that_is_selected_upward(select: str, desired: int, limit: Limit) -> None:
    up = rules(0, select, ("Pods", 4, 60), ("Percent", 100, 60))
    found = verdict(spec(maximum=100, up=up), 10, {"queue": 90.0})
    assert (found.desired, found.limit) == (desired, limit)


@pytest.mark.parametrize(("select", "desired"), [("Max", 5), ("Min", 8), ("Disabled", 10)])
def test_the_policy_that_is_selected_downward(select: str, desired: int) -> None:
    down = rules(0, select, ("Pods", 2, 60), ("Percent", 50, 60))
    found = verdict(spec(down=down), 10, {"queue": 0.0})
    assert (found.desired, found.limit) == (desired, Limit.DOWN)


def test_policies_count_what_changed_within_their_period() -> None:
    told = spec(maximum=100, up=rules(0, "Max", ("Pods", 4, 60)))
    history = changed(told, History(), NOW - 30, 6, 8)
    assert verdict(told, 8, {"queue": 50.0}, history=history).desired == 10  # 6 at the period's start, plus 4
    assert verdict(told, 8, {"queue": 50.0}, history=history, now=NOW + 31).desired == 12
    history = changed(told, history, NOW - 10, 8, 7)  # what was taken away may come back
    assert verdict(told, 7, {"queue": 50.0}, history=history).desired == 10


def test_percent_rounds_up_upward_and_down_downward() -> None:
    up = spec(up=rules(0, "Max", ("Percent", 10, 60)))
    assert verdict(up, 1, {"queue": 9.0}).desired == 2
    down = spec(down=rules(0, "Max", ("Percent", 10, 60)))
    assert verdict(down, 5, {"queue": 1.0}).desired == 4


def test_scale_down_waits_for_its_window() -> None:
    told = spec()
    assert told.down == SCALE_DOWN
    history = seen((299, 4), (100, 2))
    held = verdict(told, 4, {"queue": 1.0}, history=history)
    assert (held.desired, held.recommended, held.stabilization) == (4, 1, Stabilization.DOWN)
    after = verdict(told, 4, {"queue": 1.0}, history=history, now=NOW + 2)
    assert (after.desired, after.stabilization) == (2, Stabilization.DOWN)  # the highest of the rest
    assert verdict(told, 4, {"queue": 1.0}, history=history, now=NOW + 500).desired == 1


def test_scale_up_waits_for_its_window() -> None:
    told = spec(up=rules(60, "Max", ("Pods", 10, 15)))
    held = verdict(told, 1, {"queue": 6.0}, history=seen((30, 1)))
    assert (held.desired, held.stabilization) == (1, Stabilization.UP)
    assert verdict(told, 1, {"queue": 6.0}, history=seen((50, 3), (10, 5))).desired == 3
    assert verdict(told, 1, {"queue": 6.0}, history=seen((61, 1))).desired == 6


def test_the_first_recommendation_is_the_current_number() -> None:
    """So a scaler that starts anew takes nothing away before its window has passed."""
    found, history = decide(spec(), History(), NOW, 3, 3, {"queue": 0.0})
    assert found.desired == 3
    assert [m.replicas for m in history.recommendations] == [3, 0]


def test_what_no_rule_looks_back_to_is_forgotten() -> None:
    told, history = spec(), seen((1000, 7))
    _, history = decide(told, history, NOW, 2, 2, {"queue": 2.0})
    assert [m.replicas for m in history.recommendations] == [2]
    history = changed(told, changed(told, history, NOW - 100, 1, 2), NOW, 2, 3)
    assert [m.time_s for m in history.added] == [NOW]
    assert changed(told, history, NOW, 3, 3) == history


policies = st.lists(
    st.builds(
        Policy,
        kind=st.sampled_from(["Pods", "Percent"]),
        value=st.integers(1, 200),
        period_s=st.integers(1, 120).map(float),
    ),
    min_size=1,
    max_size=3,
)
any_rules = st.builds(
    Rules,
    window_s=st.integers(0, 300).map(float),
    policies=policies.map(tuple),
    select=st.sampled_from(["Max", "Min", "Disabled"]),
    tolerance=st.sampled_from([0.0, 0.1, 0.5]),
)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    minimum = draw(st.integers(1, 5))
    kinds = draw(st.lists(st.sampled_from(["AverageValue", "Value"]), min_size=1, max_size=2))
    targets = tuple(
        Target(name=f"m{n}", kind=kind, value=draw(st.integers(1, 50)))  # type: ignore[arg-type]
        for n, kind in enumerate(kinds)
    )
    maximum = minimum + draw(st.integers(0, 20))
    return Spec(minimum=minimum, maximum=maximum, targets=targets, up=draw(any_rules), down=draw(any_rules))


@given(specs(), st.lists(st.tuples(st.integers(1, 90), st.lists(st.floats(0, 500), max_size=2)), max_size=30))
def test_whatever_the_load_does(told: Spec, steps: list[tuple[int, list[float]]]) -> None:
    """The number stays within its bounds, moves only where metrics and rules allow it, and every limit is named."""
    history, now, current = History(), NOW, told.minimum
    for wait, numbers in steps:
        now += wait
        values = {f"m{n}": v for n, v in enumerate(numbers) if n < len(told.targets)}
        found, history = decide(told, history, now, current, current, values)
        assert told.minimum <= found.desired <= told.maximum
        if found.desired > current:
            assert found.recommended is not None
            assert found.recommended >= found.desired
            assert told.up.select != "Disabled"
        if found.desired < current:
            assert len(values) == len(told.targets)
            assert found.recommended is not None
            assert found.recommended <= found.desired
            assert told.down.select != "Disabled"
        if found.recommended is not None and found.recommended != found.desired:
            assert (found.stabilization, found.limit) != (Stabilization.READY, Limit.NONE)
        history = changed(told, history, now, current, found.desired)
        current = found.desired


@given(st.integers(1, 20), st.floats(0, 1000), st.floats(0, 1000))
def test_more_load_never_asks_for_fewer(current: int, one: float, other: float) -> None:
    exact = Rules(window_s=0, policies=SCALE_DOWN.policies, tolerance=0)
    told = spec(maximum=1000, up=exact, down=exact)
    low, high = (verdict(told, current, {"queue": v}).recommended for v in sorted((one, other)))
    assert low is not None
    assert high is not None
    assert high >= low


def test_a_steady_load_is_reached_and_kept() -> None:
    told, history, current = spec(), History(), 1
    numbers = []
    for step in range(60):
        found, history = decide(told, history, NOW + 15 * step, current, current, {"queue": 8.0})
        history = changed(told, history, NOW + 15 * step, current, found.desired)
        current = found.desired
        numbers.append(current)
    assert numbers[:3] == [5, 8, 8]
    assert set(numbers[2:]) == {8}
