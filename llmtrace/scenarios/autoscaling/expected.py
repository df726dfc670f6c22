"""The traces that the scenario must produce: one tree for each request, and one for each decision."""

from __future__ import annotations

from dataclasses import replace

from llmtrace.scenarios.autoscaling.arms import NAME
from llmtrace.scenarios.expectation import Expectation
from llmtrace.scenarios.required import expectation
from llmtrace.semconv import attributes as a
from llmtrace.semconv.definitions import registry
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.tempo import TempoClient, search_all

REQUEST = expectation(registry(), NAME, "request")
DECISIONS = {
    form: replace(expectation(registry(), NAME, form), may_fail=True)
    for form in (a.SCALE_UP, a.SCALE_DOWN, a.SCALE_HOLD)
}
"""By direction. A replica that never got ready is an error that the trace is right to tell."""
REQUESTS = f'{{ name = "{a.GATEWAY_SPAN}" }}'
"""TraceQL for the requests of anybody."""
SLACK_S = 120
"""Decisions of a run may be taken some time after its last request, and are sent when their effect is known."""


def expected(trace: Trace) -> Expectation:
    """What a trace must have: of a decision by its direction, else what a request has."""
    for root in trace.spans:  # of millions of traces
        if root.name == a.DECISION_SPAN:
            break
    else:
        return REQUEST
    direction = str(root.attributes.get(a.SCALE_DIRECTION))
    if direction == a.SCALE_DOWN and not trace.named(a.APPLY_SPAN) and _has_no_more(root):
        direction = a.SCALE_HOLD
    return DECISIONS.get(direction, REQUEST)


def _has_no_more(decision: Span) -> bool:
    """Whether no more replicas are ready than shall stay: those to go never came, and nothing is to be done."""
    ready, desired = (decision.attributes.get(name) for name in (a.REPLICAS_READY, a.REPLICAS_DESIRED))
    return isinstance(ready, int) and isinstance(desired, int) and ready <= desired


def decisions(store: TempoClient, start_ns: int, end_ns: int) -> list[Trace]:
    """The traces of the decisions that were taken in this time, or soon after."""
    query = f'{{ name = "{a.DECISION_SPAN}" }}'
    found = search_all(store, query, start_s=start_ns // 10**9, end_s=end_ns // 10**9 + SLACK_S)
    traces = (store.trace(summary.trace_id) for summary in found)
    return [t for t in traces if t is not None and t.spans]
