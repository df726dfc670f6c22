"""Which decisions there were: each once, whatever is told twice, late, out of order or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes_objects import METRIC, NAMESPACE, UID, event, hpa, ns, owned_by_keda, rescale, scaled_object

from llmtrace.autoscale.kubernetes import scalers
from llmtrace.autoscale.kubernetes.ledger import KEPT_S, Ledger, Prices, State
from llmtrace.semconv import attributes as a

NOW = ns(600)


def ledger(since: float = -10) -> Ledger:
    return Ledger(State(since_ns=ns(since)), Prices())


def restarted(before: Ledger) -> Ledger:
    return Ledger(State.model_validate_json(before.state.model_dump_json()), Prices())


def tell(book: Ledger, *told: dict) -> None:
    for item in told:
        if item["kind"] == "Event":
            for found in scalers.rescales(item):
                book.take_event(found, NOW, 1)
        else:
            book.take(scalers.read(item, [], []), NOW, 1)


def test_a_status_is_a_decision_with_everything_that_it_saw():
    book = ledger()
    tell(book, hpa(1, 1), hpa(1, 3, 15))
    (found,) = book.state.decisions
    assert (found.current, found.desired, found.direction, found.time_ns) == (1, 3, a.SCALE_UP, ns(15))
    assert found.metrics[0].value == pytest.approx(2.333)
    assert found.id == f"{NAMESPACE}/vllm-{UID[:8]}-{ns(15) // 10**9}-3"


def test_an_event_alone_is_a_decision_without_the_metrics_of_its_moment():
    book = ledger()
    tell(book, hpa(1, 1), rescale(3, 15))
    (found,) = book.state.decisions
    assert (found.current, found.desired, found.metric) == (1, 3, METRIC)
    assert found.metrics[0].value is None
    assert found.reason.startswith("external metric")


def test_a_status_that_comes_after_the_event_fills_in_the_metrics():
    book = ledger()
    tell(book, hpa(1, 1), rescale(3, 15), hpa(1, 3, 16, limited=("True", "TooManyReplicas")))
    (found,) = book.state.decisions
    assert found.metrics[0].value is not None
    assert (found.limit, found.time_ns) == ("TooManyReplicas", ns(15))
    assert found.reason.startswith("external metric")


def test_later_versions_of_the_status_are_no_decisions_and_do_not_change_it():
    book = ledger()
    tell(book, hpa(1, 1), hpa(1, 3, 15), hpa(3, 3, 15, able="ReadyForNewScale", average="100m"))
    (found,) = book.state.decisions
    assert found.metrics[0].value == pytest.approx(2.333)


def test_a_change_whose_status_was_missed_is_found_in_a_later_one():
    book = ledger()
    tell(book, hpa(1, 1), hpa(3, 3, 15, able="ReadyForNewScale"))
    (found,) = book.state.decisions
    assert (found.current, found.desired, found.detailed) == (1, 3, False)


def test_what_was_decided_before_the_first_watcher_is_history():
    book = ledger(since=100)
    tell(book, hpa(3, 3, 15, able="ReadyForNewScale"), rescale(3, 15))
    assert book.state.decisions == []


def test_what_is_older_than_what_is_remembered_is_no_decision():
    book = ledger(since=-3 * KEPT_S)
    tell(book, hpa(3, 3, 600 - KEPT_S - 10, able="ReadyForNewScale", created=-3 * KEPT_S))
    assert book.state.decisions == []


def test_decisions_missed_while_down_are_found_by_their_events():
    before = ledger()
    tell(before, hpa(1, 1), hpa(1, 3, 15))
    book = restarted(before)
    tell(
        book,
        hpa(2, 2, 90, able="ReadyForNewScale"),
        rescale(3, 15),
        rescale(5, 60),
        rescale(2, 90, reason="All metrics below target"),
    )
    assert [(d.current, d.desired) for d in book.state.decisions] == [(1, 3), (5, 2), (3, 5)]


def test_a_limit_that_comes_is_a_decision_of_its_own_once():
    book = ledger()
    held = hpa(8, 8, told=30, limited=("True", "TooManyReplicas"))
    tell(book, hpa(8, 8, told=15), held, held, hpa(8, 8, told=45, limited=("True", "TooManyReplicas"), average="9"))
    (found,) = book.state.decisions
    assert (found.direction, found.limit, found.time_ns) == (a.SCALE_HOLD, "TooManyReplicas", ns(30))
    assert found.metrics[0].value is not None
    tell(book, hpa(8, 8, told=60))
    assert [d.reason for d in book.state.decisions] == ["TooManyReplicas", "no longer held back"]
    tell(restarted(book), hpa(8, 8, told=60))
    assert len(book.state.decisions) == 2


def test_the_end_of_a_stabilisation_window_is_none():
    book = ledger()
    tell(book, hpa(3, 3, told=15, able="ScaleDownStabilized"), hpa(3, 3, told=30))
    assert [d.stabilization for d in book.state.decisions] == ["ScaleDownStabilized"]


def test_keda_scales_from_and_to_zero_by_itself():
    book = ledger()
    book.take(scalers.read(hpa(0, 0, able="SucceededGetScale", **owned_by_keda()), [scaled_object()], []), NOW, 0)
    about = {"kind": "ScaledObject", "namespace": NAMESPACE, "name": "vllm-scaling", "uid": "scaled-object"}
    up = event(
        "KEDAScaleTargetActivated", "Scaled apps/v1.Deployment llm-d/vllm from 0 to 1, triggered by s0", 15, about
    )
    # As the recorder of events.k8s.io writes it.
    up |= {"firstTimestamp": None, "lastTimestamp": None, "eventTime": "2027-01-15T08:00:15.250000Z"}
    down = event("KEDAScaleTargetDeactivated", "Deactivated apps/v1.Deployment llm-d/vllm from 1 to 0", 400, about)
    tell(book, up, down, up)
    assert [(d.scaler_kind, d.current, d.desired) for d in book.state.decisions] == [
        ("ScaledObject", 0, 1),
        ("ScaledObject", 1, 0),
    ]
    assert book.state.decisions[0].time_ns == ns(15) + 250_000_000


def test_an_hpa_made_anew_is_another_scaler():
    book = ledger()
    tell(book, hpa(1, 1), hpa(1, 3, 15), hpa(3, 3, 15, able="ReadyForNewScale", uid="another", created=20))
    assert len(book.state.decisions) == 1


def test_decisions_that_cannot_be_told_again_are_forgotten_but_the_last():
    book = ledger()
    tell(book, hpa(1, 1), hpa(1, 3, 15), hpa(3, 1, 60))
    book.forget(ns(60 + 3 * KEPT_S), {UID})
    assert [k.desired for k in book.state.scalers[UID].known] == [1]
    book.forget(ns(60 + 3 * KEPT_S), set())
    assert book.state.scalers == {}


@dataclass(frozen=True)
class Step:
    time: int
    before: int
    size: int
    late: int


@st.composite
def histories(draw):
    """What an HPA decided; the event and the status of each may have times that are a second apart."""
    steps, time, size = [], 0, 1
    for _ in range(draw(st.integers(1, 6))):
        time += draw(st.integers(5, 40))
        new = draw(st.integers(1, 8).filter(lambda n, old=size: n != old))
        steps.append(Step(time, size, new, draw(st.integers(0, 1))))
        size = new
    return steps


@settings(max_examples=300)
@given(st.data(), histories())
def test_whatever_is_told_twice_late_or_lost_every_decision_is_known_once(data, steps):
    told = []
    for step in steps:
        status = hpa(step.before, step.size, step.time + step.late)
        ways = data.draw(
            st.sampled_from([[status], [rescale(step.size, step.time)], [status, rescale(step.size, step.time)]])
        )
        told += ways * data.draw(st.integers(1, 2))
    order = data.draw(st.permutations(told))
    book = ledger()
    # The HPA was read before anything was decided, as it is after a restart.
    tell(book, hpa(1, 1))
    for number, item in enumerate(order):
        tell(book, item)
        if number == len(order) // 2:
            book = restarted(book)
            tell(book, hpa(steps[-1].size, steps[-1].size))
    known = book.state.scalers[UID].known
    assert [k.desired for k in known] == [s.size for s in steps]
    assert all(abs(k.time_ns - ns(s.time)) <= 10**9 for k, s in zip(known, steps, strict=True))
    assert len({d.id for d in book.state.decisions}) == len(book.state.decisions) == len(steps)
