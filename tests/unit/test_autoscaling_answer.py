"""The autoscaling answer on runs whose right answer is known."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from example_scaling import (
    SECOND,
    Day,
    decision_trace,
    fails,
    linked,
    ns,
    record,
    request,
    starts,
    stops,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.autoscaling import measure, within_limits
from llmtrace.autoscale.record import MetricRecord
from llmtrace.errors import UserError
from llmtrace.scenarios.autoscaling import SCENARIO, report
from llmtrace.scenarios.autoscaling.answer import AutoscalingAnswer, answer
from llmtrace.scenarios.autoscaling.expected import expected
from llmtrace.scenarios.autoscaling.requests import Overlaps
from llmtrace.scenarios.autoscaling.text import verdict_text
from llmtrace.scenarios.expectation import verify_trace
from llmtrace.semconv import attributes as a
from llmtrace.semconv.conformance import check
from llmtrace.traces.model import Trace

ANSWER = sys.modules[answer.__module__]


def burst() -> list[Trace]:
    """Six reports wait from 20 s on, and two of six chats; replicas come at 25 and go at 100."""
    traces = [request(n, 20 + 0.5 * n, wait=24 - 0.5 * n) for n in range(1, 7)]
    traces += [request(n, 2.0 * n, kind="chats", tokens=20) for n in range(10, 14)]
    traces += [request(n, 22.0, wait=22.0, kind="chats", tokens=20) for n in range(20, 22)]
    up = record(25, 1, 3, 6.0, replicas=[starts("vllm-1", 25), starts("vllm-2", 25, first=None)])
    down = record(100, 3, 1, 0.0, replicas=[stops("vllm-2", 100), stops("vllm-1", 100, took=5)], limit=a.NOT_LIMITED)
    return [*traces, decision_trace(up), decision_trace(down)]


@pytest.fixture
def found() -> AutoscalingAnswer:
    return answer("run-1", burst())


def test_the_drivers_are_those_that_the_metric_counted(found: AutoscalingAnswer) -> None:
    up, down = found.decisions
    assert up.drivers == 6
    assert set(up.examples) == {f"{n:032x}" for n in range(1, 7)}
    assert up.examples[0] == f"{1:032x}"  # the longest
    assert down.drivers == 0
    assert found.attribution.model_dump() == {"attributed": 6, "of_driving_kind": 6, "precision": 1.0, "recall": 1.0}
    assert {k.kind: (k.requests, k.drivers) for k in found.kinds} == {"reports": (6, 6), "chats": (6, 0)}
    assert found.led_to == {f"{n:032x}": [up.id] for n in range(1, 7)}


def test_what_waiting_cost(found: AutoscalingAnswer) -> None:
    """From the decision at 25 s to the first token of a new replica at 43 s, eight requests waited all the time."""
    up = found.decisions[0]
    assert up.useful_s == pytest.approx(18)
    assert up.queue_then == 8
    assert up.wait_user_s == pytest.approx(8 * 18)
    assert up.wait_token_s == pytest.approx(6 * 18 * 100 + 2 * 18 * 20)
    assert up.detection_s == pytest.approx(4.5)
    assert up.warm_pool_s == pytest.approx(8 * 17)
    waited_before = sum(25 - (20 + 0.5 * n) for n in range(1, 7)) + 2 * 3
    assert up.prediction_s == pytest.approx(8 * 17 + waited_before)


def test_the_time_until_useful_by_phase_and_the_cost(found: AutoscalingAnswer) -> None:
    up = found.decisions[0]
    served, unused = up.replicas
    assert served.phases == pytest.approx({"container.start": 10, "model.load": 5, "ready": 2, "first_request": 1})
    assert served.useful_s == pytest.approx(18)
    assert (unused.outcome, unused.useful_s) == (a.OUTCOME_UNUSED, None)
    assert served.accelerator_s == pytest.approx(80)  # from 25 to the end of its drain at 105
    assert unused.accelerator_s == pytest.approx(78)
    assert not served.still_running
    assert up.cost == pytest.approx(158 / 3600 * 3.6)
    assert found.accelerator_s == pytest.approx(158)


def test_it_helped_and_the_way_back_was_harmless(found: AutoscalingAnswer) -> None:
    up, down = found.decisions
    assert up.queue_before == pytest.approx(8)
    assert up.queue_after == pytest.approx(8 / 18, rel=0.01)  # the last second of their waits
    assert (up.verdict, down.verdict) == ("helped", "harmless")
    assert "2 decisions: 1 up, 1 down; 1 limited by the maximum" in found.verdict
    assert "1 of 1 helped" in found.verdict


def test_the_timeline(found: AutoscalingAnswer) -> None:
    def at(seconds: float) -> dict[str, Any]:
        moment = min(found.timeline, key=lambda m: abs(m.at_s + (found.start_ns - ns(0)) / SECOND - seconds))
        return moment.model_dump(exclude={"at_s"})

    assert at(30) == {"waiting": 8, "running": 0, "desired": 3, "ready": 1}
    assert at(60) == {"waiting": 0, "running": 0, "desired": 3, "ready": 3}
    assert found.timeline[-1].ready == 1


def test_the_checks_agree(found: AutoscalingAnswer) -> None:
    assert {c.name: c.ok for c in found.checks} == {
        "the metric and the requests that it counts": True,
        "the scaler's links and the requests' own times": None,
        "each decision begins where the one before ended": True,
    }


def test_a_metric_that_says_something_else_than_the_traces() -> None:
    wrong = decision_trace(record(25, 1, 3, 20.0, replicas=[starts("vllm-1", 25)]))
    found = answer("run-1", [*burst()[:-2], wrong])
    (values,) = [c for c in found.checks if c.name.startswith("the metric")]
    assert values.ok is False
    assert "epp-queue-size 20, by the traces 6 to 6" in values.disagreements[0]


def test_a_time_that_is_cut_to_seconds_and_an_average_that_is_rounded() -> None:
    requests = [request(n, 25.3, wait=10) for n in range(1, 8)]
    up = record(25, 3, 7, 7.002, resolution_ms=1000.0, replicas=[starts("vllm-1", 25)])
    found = answer("run-1", [*requests, decision_trace(up)])
    assert found.decisions[0].drivers == 7
    assert [c.name for c in found.checks if c.disagreements] == []
    exact = decision_trace(up.model_copy(update={"resolution_ms": 0.0}))
    assert answer("run-1", [*requests, exact]).decisions[0].drivers == 0


def test_links_are_held_against_the_requests_times() -> None:
    *requests, up, down = burst()
    good = answer("run-1", [*requests, linked(up, f"{1:032x}", f"{2:032x}"), down])
    bad = answer("run-1", [*requests, linked(up, f"{1:032x}", f"{10:032x}"), down])
    for found, ok in ((good, True), (bad, False)):
        assert [c.ok for c in found.checks if c.name.startswith("the scaler's links")] == [ok]


def test_a_decision_that_is_missing() -> None:
    *rest, _, down = burst()
    first = decision_trace(record(10, 1, 1, 1.0))
    found = answer("run-1", [*rest, first, down])
    assert [c.ok for c in found.checks if c.name.startswith("each decision")] == [False]


def test_a_decision_that_was_sent_twice_counts_once() -> None:
    traces = burst()
    assert len(answer("run-1", [*traces, traces[-1]]).decisions) == 2


def test_a_scaler_that_is_held_at_the_maximum() -> None:
    traces = [request(n, 20, wait=60) for n in range(1, 8)]
    held = decision_trace(record(30, 3, 3, 7.0))
    later = decision_trace(record(70, 3, 3, 1.0, limit=a.NOT_LIMITED))
    found = answer("run-1", [*traces, held, later])
    first, second = found.decisions
    assert (first.verdict, first.limit, first.limited_s) == ("limited", a.LIMITED_MAX, pytest.approx(40))
    assert first.wait_user_s == pytest.approx(7 * 40)
    assert first.drivers == 7
    assert second.verdict == "held"
    assert "1 limited by the maximum" in found.verdict


def test_what_held_the_number_is_said() -> None:
    held = [
        record(30, 3, 3, 1.0, limit=a.NOT_LIMITED, stabilization=a.DOWN_STABILIZED),
        record(40, 3, 3, 1.0, limit=a.LIMITED_DOWN, stabilization=a.DOWN_STABILIZED),
        record(50, 3, 3, 3.0, limit=a.NOT_LIMITED),
        record(60, 3, 3, None, limit=a.NOT_LIMITED),
        record(70, 3, 3, 7.0),
        record(90, 3, 3, 1.0, limit=a.NOT_LIMITED, replicas=[starts("vllm-2", 90)]),
    ]
    found = answer("run-1", [request(1, 20), *map(decision_trace, held)])
    assert [verdict_text(d) for d in found.decisions] == [
        "held: scale-down window",
        "held: scale-down policy",
        "no longer held",
        "held: no metric",
        "limited to 3 for 20 s",
        "restored",
    ]
    assert [d.driven for d in found.decisions] == [False, False, False, False, True, False]


def test_a_replica_that_never_became_ready() -> None:
    traces = [request(n, 20, wait=100) for n in range(1, 5)]
    told = "not ready within 60 s; its log says: no memory left"
    up = decision_trace(record(30, 1, 2, 4.0, replicas=[fails("vllm-1", 30, told)]))
    found = answer("run-1", [*traces, up])
    (decision,) = found.decisions
    assert decision.verdict == "never ready"
    assert decision.failures == [f"vllm-1: {told}"]
    assert decision.replicas[0].accelerator_s == pytest.approx(60)
    assert "1 replicas never became ready" in found.verdict


def test_capacity_that_came_when_the_queue_was_gone() -> None:
    traces = [request(n, 20, wait=7) for n in range(1, 5)]
    up = decision_trace(record(25, 1, 2, 4.0, replicas=[starts("vllm-1", 25, start=40)]))
    assert answer("run-1", [*traces, up]).decisions[0].verdict == "came too late"


def test_capacity_that_changed_nothing() -> None:
    traces = [request(n, 20, wait=200) for n in range(1, 5)]
    up = decision_trace(record(25, 1, 2, 4.0, replicas=[starts("vllm-1", 25)]))
    assert answer("run-1", [*traces, up]).decisions[0].verdict == "did not help"


def test_waits_that_two_decisions_have_in_common_count_once() -> None:
    traces = [request(n, 20, wait=100) for n in range(1, 5)]
    ups = [decision_trace(record(25, 1, 2, 4.0, replicas=[starts("vllm-1", 25)]))]
    ups.append(decision_trace(record(30, 2, 3, 4.0, replicas=[starts("vllm-2", 30)])))
    found = answer("run-1", [*traces, *ups])
    # Useful 18 s after each decision, ready after 17 s, and all four began to wait 5 s before the first.
    assert [d.wait_user_s for d in found.decisions] == [pytest.approx(4 * 18)] * 2
    assert "requests waited 92 user-seconds" in found.verdict
    assert "warm replicas would have saved at most 88 user-seconds, a prediction 108" in found.verdict


def test_a_drain_that_cut_requests() -> None:
    down = decision_trace(record(50, 2, 1, 0.0, replicas=[stops("vllm-1", 50, running=3, cut=2)]))
    (decision,) = answer("run-1", [request(1, 1), down]).decisions
    assert [d.model_dump() for d in decision.drained] == [
        {"name": "vllm-1", "outcome": a.OUTCOME_CUT, "running": 3, "cut": 2, "moved": None}
    ]
    assert verdict_text(decision) == "cut requests (3 running, 2 cut)"


def test_a_container_that_was_killed_cut_requests_if_nobody_counted_them() -> None:
    drain = stops("vllm-1", 50, cut=1)
    verdicts = []
    for cut in (None, 0):
        drain.cut = cut
        down = decision_trace(record(50, 2, 1, 0.0, replicas=[drain]))
        verdicts.append(answer("run-1", [request(1, 1), down]).decisions[0].verdict)
    assert verdicts == ["cut requests", "harmless"]


def test_flapping() -> None:
    turns = [(10.0, 1, 2), (100.0, 2, 1), (200.0, 1, 2), (5000.0, 2, 1)]
    traces = [decision_trace(record(at, before, after, 2.0, limit=a.NOT_LIMITED)) for at, before, after in turns]
    found = answer("run-1", [request(1, 1), *traces])
    assert [d.flapping for d in found.decisions] == [False, True, False, False]
    assert "1 decisions flapped" in found.verdict


def test_without_the_queues_own_span_the_wait_is_the_gap() -> None:
    """llm-d's picker traces no queue."""
    traces = [request(n, 20, wait=20, queue_span=False) for n in range(1, 4)]
    up = decision_trace(record(25, 1, 2, 3.0, replicas=[starts("vllm-1", 25)]))
    assert answer("run-1", [*traces, up]).decisions[0].drivers == 3


def test_without_decisions_or_requests() -> None:
    found = answer("run-1", [request(1, 1)])
    assert found.verdict == "No decision was taken."
    assert "does the scaler run" in found.notes[0]
    with pytest.raises(UserError, match="no measured requests"):
        answer("run-1", [burst()[-1]])


def test_the_text_and_the_report_show_it_all(found: AutoscalingAnswer) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in SCENARIO.text(found):
        console.print(part)
    shown = console.export_text()
    for words in ("epp-queue-size 6/1", "helped", "vllm-1", "precision 100%, recall 100%", "harmless"):
        assert words in shown
    html = SCENARIO.html(found)
    for words in ("vegaEmbed", "container.start", found.decisions[0].trace_id, "prediction"):
        assert words in html
    assert SCENARIO.example(found) == found.decisions[0].trace_id


def test_the_decisions_traces_are_as_expected_and_damage_is_found() -> None:
    for trace in burst()[-2:]:
        assert verify_trace(trace, expected(trace)) == []
        assert check([trace]).findings == []
    up = burst()[-2]
    lost = Trace(up.trace_id, tuple(s for s in up.spans if s.name != a.REPLICA_SPAN))
    problems = verify_trace(lost, expected(lost))
    assert {p.component for p in problems} == {"scaler"}
    assert any("no span 'autoscale.replica'" in p.message for p in problems)


def test_a_replica_that_never_came_is_no_fault_of_the_trace() -> None:
    """Nor is it that a decision had nothing to take away, for fewer were ready than it wanted."""
    up, down = burst()[-2:]
    failed = tuple(replace(s, status="ERROR") if s.name in (a.APPLY_SPAN, a.REPLICA_SPAN) else s for s in up.spans)
    assert verify_trace(Trace(up.trace_id, failed), expected(up)) == []
    (root,) = down.roots
    for ready, good in ((root.attributes[a.REPLICAS_DESIRED], True), (root.attributes[a.REPLICAS_CURRENT], False)):
        alone = Trace(down.trace_id, (replace(root, attributes={**root.attributes, a.REPLICAS_READY: ready}),))
        assert (verify_trace(alone, expected(alone)) == []) is good


def drivers_of(found: AutoscalingAnswer) -> list[set[str]]:
    """The requests that drove each decision that added replicas, by the way back; of others none is told."""
    told: dict[str, set[str]] = {d.id: set() for d in found.decisions}
    for request_id, led in found.led_to.items():
        for decision_id in led:
            told[decision_id].add(request_id)
    return list(told.values())


def test_a_day_is_attributed_without_a_mistake() -> None:
    """Every driver of every decision is found, and nothing else: neither chats that wait as long, nor reports that
    waited until 50 ms before the window, or from 50 ms after it."""
    day = Day(requests=6000, decisions=200)
    found = answer("day", day.traces())
    assert len(found.decisions) == 200
    assert found.requests == 6000
    assert [d.drivers for d in found.decisions] == [len(mine) for mine in day.drivers]
    assert drivers_of(found)[::2] == day.drivers[::2]  # every other one adds a replica
    assert (found.attribution.precision, found.attribution.recall) == (1.0, 1.0)
    assert all(c.ok is not False for c in found.checks)


@pytest.mark.parametrize("shift_s", [-1.0, 1.0])
def test_a_window_that_is_a_second_off_has_others_drivers(shift_s: float) -> None:
    day = Day(requests=600, decisions=20, shift_s=shift_s)
    found = answer("day", day.traces())
    assert all(told != mine for told, mine in list(zip(drivers_of(found), day.drivers, strict=True))[::2])


def test_what_is_cut_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "led_to" not in "".join(answer("run-1", burst()).notes)
    monkeypatch.setattr(ANSWER, "MOST_TOLD", 2)
    monkeypatch.setattr(report, "MOST_ROWS", 1)
    found = answer("run-1", burst())
    assert list(found.led_to) == [f"{n:032x}" for n in (1, 2)]
    assert found.notes == ["led_to has the first 2 of the 6 requests that drove decisions"]
    assert "the first 1 of 2 decisions; --json has them all" in SCENARIO.html(found)


def test_a_request_that_is_told_is_told_with_all_its_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ANSWER, "MOST_TOLD", 1)
    ups = [decision_trace(record(at, 1, 2, 2.0, replicas=[starts("vllm-1", at)])) for at in (25, 30)]
    found = answer("run-1", [request(1, 20, wait=60), request(2, 21, wait=60), *ups])
    assert found.led_to == {f"{1:032x}": [d.id for d in found.decisions]}


def on(query: str, value: float) -> Trace:
    """A decision at 30 s to add a replica, on another metric."""
    metric = MetricRecord(name="signal", query=query, target=1.5, target_type="AverageValue", value=value, proposal=2)
    told = record(30, 1, 2, value, metric="signal", metrics=[metric], replicas=[starts("vllm-1", 30)])
    return decision_trace(told)


def shown(found: AutoscalingAnswer) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    for part in SCENARIO.text(found):
        console.print(part)
    return console.export_text()


def test_a_backlog_of_tokens_is_due_to_prompts_by_their_tokens() -> None:
    requests = [
        request(1, 25, run=20, ttft=8, tokens=110),
        request(2, 25, run=20, ttft=6, tokens=5010),
        request(3, 20, run=20, ttft=5, tokens=9010),
        request(4, 25, wait=20, tokens=9010),
    ]
    found = answer("run-1", [*requests, on("sum(llm_d_epp_inflight_tokens) / 15928", 3.0)])
    (decision,) = found.decisions
    assert (decision.attributable, decision.drivers, decision.driver_tokens) == (True, 2, 5100)
    assert decision.examples == [f"{2:032x}", f"{1:032x}"]
    assert set(found.led_to) == set(decision.examples)
    assert "2 (5,100 tokens)" in shown(found)
    # A number of seconds is no number of requests.
    assert [c.ok for c in found.checks if c.name.startswith("the metric")] == [None]


def test_saturation_is_due_to_all_that_the_servers_have() -> None:
    requests = [request(1, 25, run=20), request(2, 25, wait=20), request(3, 25, run=9, kind="chats")]
    found = answer("run-1", [*requests, on("max(llm_d_epp_flow_control_pool_saturation)", 1.2)])
    assert set(found.led_to) == {f"{n:032x}" for n in (1, 3)}
    assert found.decisions[0].driver_tokens is None
    assert [c.ok for c in found.checks if c.name.startswith("the metric")] == [None]


def test_what_nobody_can_tell_is_said_and_not_skipped() -> None:
    estimated = "histogram_quantile(0.9, sum(rate(llm_d_epp_request_ttft_seconds_bucket[1m])) by (le)) / 3"
    found = answer("run-1", [request(1, 25, wait=20), on(estimated, 2.0)])
    (decision,) = found.decisions
    assert (decision.attributable, decision.drivers) == (False, 0)
    assert "not attributable: no single requests are in signal, which drove decisions" in found.notes
    assert "not attributable" in shown(found)
    assert f"<td>{decision.id}</td><td>not attributable</td>" in SCENARIO.html(found)
    assert found.attribution.recall is None


def test_the_bench_fails_above_its_limits() -> None:
    result = measure(400, 10) | {"memory, MiB": 2048}  # that of all tests, here
    assert result["traces verified"] == 410
    assert within_limits(result), result
    for worse in ({"answer, s": 10.1}, {"verify, s": 10.1}, {"memory, MiB": 2049}, {"of them wrong": 1}):
        assert not within_limits(result | worse)


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(1, 5)), max_size=20)


@given(intervals, st.integers(0, 90), st.integers(0, 90))
def test_overlaps_are_those_that_counting_finds(told: list[tuple[int, int, int]], one: int, other: int) -> None:
    low, high = sorted((one, other))
    starts_ = np.asarray([ns(s) for s, _, _ in told], dtype=np.int64)
    ends = np.asarray([ns(s + d) for s, d, _ in told], dtype=np.int64)
    weights = np.asarray([w for _, _, w in told], dtype=np.float64)
    whole = sum(w * max(min(s + d, high) - max(s, low), 0) for s, d, w in told)
    overlaps = Overlaps(starts_, ends, weights)
    assert overlaps.between(ns(low), ns(high)) == pytest.approx(whole, abs=1e-6)
    assert overlaps.at(ns(low)) == sum(s <= low < s + d for s, d, _ in told)
    counts = [sum(s <= t < s + d for s, d, _ in told) for t in range(low, high + 1)]
    assert overlaps.extremes(ns(low), ns(high)) == (min(counts), max(counts))
    since = low
    while since > 0 and any(s <= since - 1 < s + d for s, d, _ in told):
        since -= 1
    if any(s <= low < s + d for s, d, _ in told):
        assert overlaps.onset(ns(low)) == ns(since)
    else:
        assert overlaps.onset(ns(low)) == ns(low)
