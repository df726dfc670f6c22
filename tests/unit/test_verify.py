"""The check of a trace against what a request must produce: good ones pass, all damage is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from example_traces import MS, changed, request_trace
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.scenarios.expectation import Expectation, ExpectedSpan, Fault, Problem, verify_trace
from llmtrace.scenarios.prefix_cache import EXPECTATION
from llmtrace.traces.model import Span, Trace

GOOD = request_trace()
UPSTREAM = request_trace(upstream=True)
INDEX = st.integers(0, len(GOOD.spans) - 1)
COMPONENTS = {"llmtrace-client": "client", "envoy": "envoy", "llm-d-epp": "picker", "vllm": "vllm"}
ENGINE_SPANS = ("queue", "prefill", "decode")


def component(span: Span) -> str:
    return "engine" if span.name in ENGINE_SPANS else COMPONENTS[span.service]


def check(trace: Trace, tolerance: float = 10.0) -> list[Problem]:
    return verify_trace(trace, EXPECTATION, clock_tolerance_ms=tolerance)


def only(trace: Trace, fault: Fault) -> Problem:
    (problem,) = [p for p in check(trace) if p.fault == fault]
    return problem


def without(trace: Trace, *names: str) -> Trace:
    return Trace(trace.trace_id, tuple(s for s in trace.spans if s.name not in names))


@pytest.mark.parametrize("trace", [GOOD, UPSTREAM], ids=["kit", "llm-d"])
def test_good_traces_have_no_problem(trace: Trace) -> None:
    assert check(trace) == []


def test_vllm_as_sibling_of_the_gateway_under_the_client() -> None:
    spans = [replace(s, parent_id=GOOD.roots[0].span_id) if s.name == "llm_request" else s for s in GOOD.spans]
    assert check(Trace(GOOD.trace_id, tuple(spans))) == []


def test_the_gateway_under_a_helper_span_of_envoy() -> None:
    helper = replace(GOOD.named("ingress")[0], span_id="e" * 16, parent_id=f"{2:016x}", name="router", kind="CLIENT")
    spans = [replace(s, parent_id="e" * 16) if s.name == "gateway.request" else s for s in GOOD.spans]
    assert check(Trace(GOOD.trace_id, (*spans, helper))) == []


def test_no_span_at_all_names_the_collector() -> None:
    (problem,) = check(Trace(GOOD.trace_id, ()))
    assert problem.component == "collector"
    assert problem.hint


@pytest.mark.parametrize("service", COMPONENTS)
def test_a_silent_component_is_named(service: str) -> None:
    trace = Trace(GOOD.trace_id, tuple(s for s in GOOD.spans if s.service != service))
    missing = [p for p in check(trace) if p.fault == Fault.MISSING]
    assert {p.component for p in missing} == {COMPONENTS[service]}


def test_a_server_without_the_plugin_is_named() -> None:
    problems = check(without(GOOD, *ENGINE_SPANS))
    assert {(p.component, p.fault) for p in problems} == {("engine", Fault.MISSING)}
    assert len(problems) == len(ENGINE_SPANS)


@given(INDEX)
def test_a_removed_span_is_blamed_on_its_component(index: int) -> None:
    gone = GOOD.spans[index]
    problems = check(Trace(GOOD.trace_id, GOOD.spans[:index] + GOOD.spans[index + 1 :]))
    assert any(p.fault == Fault.MISSING and p.component == component(gone) for p in problems)


@given(INDEX)
def test_a_duplicate_is_named(index: int) -> None:
    again = GOOD.spans[index]
    problem = only(Trace(GOOD.trace_id, (*GOOD.spans, again)), Fault.DUPLICATE)
    assert problem.component == component(again)
    assert again.span_id in problem.message


@given(INDEX.filter(lambda i: GOOD.spans[i].parent_id is not None), st.integers(11, 10**6), st.booleans())
def test_a_span_outside_of_its_parents_time_is_named(index: int, excess_ms: int, early: bool) -> None:
    span = GOOD.spans[index]
    parent = GOOD.parent(span)
    assert parent is not None
    if early:
        moved = replace(span, start_ns=parent.start_ns - excess_ms * MS)
    else:
        moved = replace(span, end_ns=parent.end_ns + excess_ms * MS)
    spans = tuple(moved if s is span else s for s in GOOD.spans)
    problems = [p for p in check(Trace(GOOD.trace_id, spans)) if p.fault == Fault.TIME]
    assert any(p.component == component(span) and repr(span.name) in p.message for p in problems)


@given(st.floats(0, 9.9))
def test_the_clock_tolerance_is_granted(skew_ms: float) -> None:
    late = replace(GOOD.named("llm_request")[0], end_ns=GOOD.named("gateway.request")[0].end_ns + int(skew_ms * MS))
    trace = Trace(GOOD.trace_id, tuple(late if s.name == "llm_request" else s for s in GOOD.spans))
    assert check(trace) == []
    assert skew_ms < 0.1 or check(trace, tolerance=skew_ms / 2) != []


@given(INDEX, st.text("0123456789abcdef", min_size=16, max_size=16))
def test_an_unknown_parent_is_an_orphan(index: int, parent_id: str) -> None:
    if parent_id in GOOD.by_id:
        return
    span = GOOD.spans[index]
    spans = tuple(replace(s, parent_id=parent_id) if s is span else s for s in GOOD.spans)
    problem = only(Trace(GOOD.trace_id, spans), Fault.ORPHAN)
    assert parent_id in problem.message
    assert component(span) in problem.message


def test_an_orphan_points_to_the_component_whose_span_is_absent() -> None:
    assert only(without(GOOD, "gateway.request_orchestration"), Fault.ORPHAN).component == "picker"
    spans = tuple(s for s in GOOD.spans if s.service != "envoy")
    problem = only(Trace(GOOD.trace_id, spans), Fault.ORPHAN)
    assert problem.component == "envoy"


def test_a_removed_scorer_is_missed_by_the_announced_count() -> None:
    problem = only(without(GOOD, "llm_d.epp.scorer.queue-scorer"), Fault.MISSING)
    assert "2 spans" in problem.message


def test_two_pick_spans_are_too_many() -> None:
    extra = replace(GOOD.named("pick_endpoints")[0], span_id="d" * 16)
    assert only(Trace(GOOD.trace_id, (*GOOD.spans, extra)), Fault.COUNT).component == "picker"


def test_a_wrong_parent_is_named() -> None:
    pick = GOOD.named("pick_endpoints")[0]
    spans = tuple(replace(s, parent_id=f"{3:016x}") if s is pick else s for s in GOOD.spans)
    problem = only(Trace(GOOD.trace_id, spans), Fault.PARENT)
    assert "'gateway.request'" in problem.message


@given(INDEX.filter(lambda i: GOOD.spans[i].parent_id is not None), INDEX)
def test_any_other_parent_is_a_problem(index: int, other: int) -> None:
    span, parent = GOOD.spans[index], GOOD.spans[other]
    classes = EXPECTATION.classify(GOOD)
    expected, found = classes[id(span)], classes[id(parent)]
    assert expected is not None
    assert found is not None
    spans = tuple(replace(s, parent_id=parent.span_id) if s is span else s for s in GOOD.spans)
    problems = check(Trace(GOOD.trace_id, spans))
    if found.key in expected.parents:
        assert problems == []
    else:
        assert {p.fault for p in problems} & {Fault.PARENT, Fault.CYCLE}
        assert component(span) in {p.component for p in problems}


def test_a_second_root_is_named() -> None:
    spans = tuple(replace(s, parent_id=None) if s.name == "llm_request" else s for s in GOOD.spans)
    assert only(Trace(GOOD.trace_id, spans), Fault.ROOT).component == "vllm"


def test_a_cycle_is_named() -> None:
    ring = {5: 7, 7: 5}
    spans = tuple(
        replace(s, parent_id=f"{ring[int(s.span_id, 16)]:016x}") if int(s.span_id, 16) in ring else s
        for s in GOOD.spans
    )
    assert Fault.CYCLE in {p.fault for p in check(Trace(GOOD.trace_id, spans))}


def test_a_missing_attribute_is_named() -> None:
    trace = changed(GOOD, "llm_request", {"gen_ai.latency.time_to_first_token": None})
    problem = only(trace, Fault.ATTRIBUTE)
    assert (problem.component, "gen_ai.latency.time_to_first_token" in problem.message) == ("vllm", True)


def test_an_error_is_named_with_its_message() -> None:
    problem = only(changed(GOOD, "chat smol", status="ERROR", status_message="TimeoutError"), Fault.ERROR)
    assert "TimeoutError" in problem.message


def test_a_foreign_trace_id_is_named() -> None:
    assert only(changed(GOOD, "llm_request", trace_id="f" * 32), Fault.TRACE_ID).component == "vllm"


def test_a_span_that_ends_before_it_starts_is_named() -> None:
    span = GOOD.named("filter_endpoints")[0]
    assert only(changed(GOOD, "filter_endpoints", end_ns=span.start_ns - 1), Fault.TIME).component == "picker"


def test_a_span_that_may_outlive_its_parent() -> None:
    expectation = Expectation(
        (
            ExpectedSpan("prefill", "sidecar", "s", "prefill"),
            ExpectedSpan("decode", "sidecar", "s", "decode", ("prefill",), may_end_late=True),
        ),
        {},
    )
    prefill = Span("a" * 32, "1" * 16, None, "prefill", "INTERNAL", 0, 10 * MS, resource={"service.name": "s"})
    decode = replace(prefill, span_id="2" * 16, parent_id="1" * 16, name="decode", start_ns=9 * MS, end_ns=900 * MS)
    assert verify_trace(Trace("a" * 32, (prefill, decode)), expectation) == []
    early = replace(decode, start_ns=-100 * MS)
    assert [p.fault for p in verify_trace(Trace("a" * 32, (prefill, early)), expectation)] == [Fault.TIME]


def test_an_expectation_that_refers_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Expectation((ExpectedSpan("a", "c", "s", "n", ("nowhere",)),), {})
