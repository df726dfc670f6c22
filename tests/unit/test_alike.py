"""Traces that are compared with others: what is said of them is what an analysis of each would say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from example_scaling import Day, request
from example_traces import request_trace
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.scenarios import alike, smoke
from llmtrace.scenarios.alike import Verifier
from llmtrace.scenarios.autoscaling import SCENARIO
from llmtrace.scenarios.expectation import Expectation, ExpectedSpan, verify_trace
from llmtrace.scenarios.prefix_cache import EXPECTATION
from llmtrace.scenarios.smoke import check
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Span, Trace

GOOD = request_trace()
INDEX = st.integers(0, len(GOOD.spans) - 1)
CHANGES: dict[str, Callable[[Span, Span], Span]] = {
    "name": lambda s, _: replace(s, name=f"{s.name}x"),
    "kind": lambda s, _: replace(s, kind="PRODUCER"),
    "status": lambda s, _: replace(s, status="ERROR"),
    "service": lambda s, _: replace(s, resource={"service.name": "other"}),
    "trace": lambda s, _: replace(s, trace_id="f" * 32),
    "no parent": lambda s, _: replace(s, parent_id=None),
    "other parent": lambda s, other: replace(s, parent_id=other.span_id),
    "unknown parent": lambda s, _: replace(s, parent_id="e" * 16),
    "same id": lambda s, other: replace(s, span_id=other.span_id),
    "early": lambda s, _: replace(s, start_ns=s.start_ns - 10**9),
    "late": lambda s, _: replace(s, end_ns=s.end_ns + 10**9),
    "ends before": lambda s, _: replace(s, end_ns=s.start_ns - 1),
    "a little late": lambda s, _: replace(s, end_ns=s.end_ns + 5 * 10**6),
    "no attributes": lambda s, _: replace(s, attributes={}),
    "empty attributes": lambda s, _: replace(s, attributes=dict.fromkeys(s.attributes)),
    "another count": lambda s, _: replace(s, attributes={**s.attributes, a.SCORER_COUNT: 7}),
}


def verifier() -> Verifier:
    """One that has seen a good trace."""
    made = Verifier(lambda _: EXPECTATION)
    assert made.problems(GOOD) == []
    return made


@pytest.mark.parametrize("change", CHANGES)
@given(INDEX, INDEX)
def test_a_change_is_found_as_if_the_trace_were_the_first(change: str, index: int, other: int) -> None:
    changed = CHANGES[change](GOOD.spans[index], GOOD.spans[other])
    trace = Trace(GOOD.trace_id, (*GOOD.spans[:index], changed, *GOOD.spans[index + 1 :]))
    assert verifier().problems(trace) == verify_trace(trace, EXPECTATION)


def test_one_that_is_alike_is_not_analysed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = verifier()
    monkeypatch.setattr(alike, "verify_trace", lambda *_, **__: pytest.fail("analysed"))
    assert warm.problems(request_trace(2, start_ms=70.0, ttft_ms=900.0, prompt=77, endpoint="vllm-2")) == []


def test_another_expectation_of_the_same_names_is_another_matter() -> None:
    span = Span("a" * 32, "1" * 16, None, "one", "INTERNAL", 0, 10, resource={"service.name": "s"})
    strict = Expectation((ExpectedSpan("one", "c", "s", "one", attributes=("x",)),), {})
    loose = Expectation((ExpectedSpan("one", "c", "s", "one"),), {})
    asked = iter((loose, loose, strict))
    made = Verifier(lambda _: next(asked))
    assert [len(made.problems(Trace("a" * 32, (span,)))) for _ in range(3)] == [0, 0, 1]


def test_a_days_traces_are_checked_and_what_is_wrong_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = list(Day(requests=600, decisions=20).traces())
    good = check(traces, SCENARIO)
    assert (good.ok, good.checked, good.wrong, good.traces) == (True, 620, 0, [])
    monkeypatch.setattr(smoke, "MOST_LISTED", 2)
    cut = [Trace(t.trace_id, t.spans[:-1]) for t in traces[:5]]
    bad = check([*cut, *traces[5:]], SCENARIO)
    assert (bad.ok, bad.checked, bad.wrong) == (False, 620, 5)
    assert [t.trace_id for t in bad.traces] == [t.trace_id for t in cut[:2]]


def test_a_request_that_somebody_else_sent_begins_at_the_gateway() -> None:
    whole = request(1, 10)
    spans = [replace(s, parent_id=None) if s.name == "ingress" else s for s in whole.spans[1:]]
    assert check([Trace(whole.trace_id, tuple(spans)), whole], SCENARIO).ok
    result = check([Trace(whole.trace_id, tuple(s for s in spans if s.name != a.SERVER_SPAN))], SCENARIO)
    assert {p.component for t in result.traces for p in t.problems} == {"vllm"}
