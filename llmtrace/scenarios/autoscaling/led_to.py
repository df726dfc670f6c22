"""The way back: which decisions a request led to, asked of a trace store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.text import Text

from llmtrace.scenarios.autoscaling.decisions import Decision, in_order, read_decision
from llmtrace.scenarios.autoscaling.expected import decisions
from llmtrace.traces.demand import demand, stay
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient


class Led(NamedTuple):
    """A decision that a request drove, which links to it, or does not: links are few, and those of the longest."""

    decision: Decision
    linked: bool


def led_to(store: TempoClient, trace: Trace) -> list[Led]:
    """The decisions that the request of this trace drove, in order; none for other traces. UserError from the store.

    Looked at are those that were taken while it was at the gateway or up to two minutes later: samples are no older.
    """
    request = stay(trace)
    if request is None:
        return []
    found = [d for t in decisions(store, request.arrived_ns, request.ended_ns) if (d := read_decision(t)) is not None]
    return [
        Led(d, trace.trace_id in d.links)
        for d in in_order(found)
        if trace.trace_id in d.links or (d.driven and demand(d.query).counts(request, *d.window))
    ]


def led_to_text(found: list[Led]) -> Iterator[Text]:
    """A line for each decision."""
    for decision, linked in found:
        how = "which links to it" if linked else "whose metric counted it, without a link"
        yield Text(
            f"drove the decision {decision.trace_id}, {how}: "
            f"{decision.current} > {decision.desired} replicas, {decision.reason}"
        )
