"""Whatever is damaged or missing in a trace, the answer and the smoke test come to an end with their own words."""

from __future__ import annotations

from dataclasses import replace

from example_pd_traces import pd_block, pd_trace
from example_stack import STACK
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llmtrace.errors import UserError
from llmtrace.render import tree
from llmtrace.scenarios.expectation import verify_trace
from llmtrace.scenarios.pd_disaggregation import SCENARIO
from llmtrace.stack import Stack
from llmtrace.traces.model import Span, Trace

UNIFIED = {"split": False, "reason": "uncached_below_threshold", "cached": 1536}
GOOD = [
    pd_trace(number=1),
    pd_trace(number=2, **UNIFIED),
    pd_trace(number=3, upstream=True),
    pd_trace(number=4, arm="never-split", upstream=True, **UNIFIED),
    pd_block(5, "by-threshold", 0, []),
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**12),
    st.floats(-5, 1e9),
    st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3),
)
UP = Stack.model_validate(STACK)


@st.composite
def damaged(draw: st.DrawFn) -> Trace:
    """A good trace of which some spans are lost, some hang elsewhere, and some attributes say something else."""
    good = draw(st.sampled_from(GOOD))
    spans: list[Span] = []
    for span in good.spans:
        if draw(st.integers(0, 9)) == 0:
            continue
        attributes = dict(span.attributes)
        for name in list(attributes):
            if draw(st.integers(0, 19)) == 0:
                attributes[name] = draw(ODD)
        parent = span.parent_id
        if draw(st.integers(0, 19)) == 0:
            parent = draw(st.sampled_from([None, *(s.span_id for s in good.spans), "f" * 16]))
        spans.append(replace(span, attributes=attributes, parent_id=parent))
    return Trace(good.trace_id, tuple(spans))


@settings(max_examples=60, deadline=None)
@given(damaged(), damaged())
def test_no_damage_ends_in_anything_but_words(one: Trace, other: Trace) -> None:
    other = Trace("e" * 32, tuple(replace(s, trace_id="e" * 32) for s in other.spans))
    console = Console(width=150)
    with console.capture():
        for trace in (one, other):
            problems = verify_trace(trace, SCENARIO.expectation(trace)) + SCENARIO.further(trace, "by-threshold", UP)
            assert all(p.component and p.message for p in problems)
            SCENARIO.complete(trace)
            console.print(tree(trace))
        try:
            found = SCENARIO.answer("run-1", [one, other])
        except UserError:
            return
        for part in SCENARIO.text(found):
            console.print(part)
        assert found.verdict
        assert SCENARIO.example(found) or not found.requests


def test_a_damaged_answer_has_a_report() -> None:
    bare = [
        Trace(t.trace_id, tuple(replace(s, attributes={}) if s.service != "llmtrace-client" else s for s in t.spans))
        for t in GOOD[:4]
    ]
    found = SCENARIO.answer("run-1", bare)
    assert "<!doctype html>" in SCENARIO.html(found)
    assert {r.reason for r in found.requests} == {None}
