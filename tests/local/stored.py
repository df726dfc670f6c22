"""Traces of the running stack's store, once they are whole enough for a test."""

from __future__ import annotations

from loopback import until

from llmtrace.stack import Stack
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient

SPANS_S = 30.0
POLL_S = 0.2


def trace_of(stack: Stack, trace_id: str, *wanted: tuple[str, str]) -> Trace:
    """The trace, once it has a span of each service and name in ``wanted``."""

    def whole() -> Trace | None:
        trace = client.trace(trace_id)
        have = {(span.service, span.name) for span in trace.spans} if trace else set()
        return trace if have >= set(wanted) else None

    with TempoClient(stack.store) as client:
        found: Trace = until(whole, f"{wanted} in trace {trace_id}", SPANS_S, poll_s=POLL_S)
    return found
