"""What the steps of each request were made of, what it waited for others in them, and what imbalance it caused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Served, integer
from llmtrace.scenarios.wide_ep.steps import PARTS, Steps
from llmtrace.scenarios.wide_ep.waiting import imbalance, waited
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Span, Trace


class RequestSteps(BaseModel):
    """A request in its traced steps, on its own rank. Times in milliseconds, summed over those steps.

    ``ms`` are by part of :data:`~llmtrace.scenarios.wide_ep.steps.PARTS`. ``waited_ms`` is what its rank waited for
    slower ones. ``imbalance_ms`` is what its steps were longer than with an even load of the experts, and
    ``caused_ms`` its share of that by its tokens in those steps: spans do not say which experts a request's tokens went
    to, so two requests with as many tokens have caused as much. ``on_demand`` of the steps were traced because a
    request was slow.
    """

    model_config = ConfigDict(frozen=True)
    trace_id: str
    arm: str
    tenant: str
    rank: int
    prefill_steps: int
    decode_steps: int
    on_demand: int
    step_ms: float
    ms: list[float]
    waited_ms: float
    imbalance_ms: float
    caused_ms: float


def request_steps(steps: Steps, served: Sequence[Served], traces: Iterable[Trace]) -> list[RequestSteps]:
    """One for each request that links to whole steps, those that waited longest first."""
    wanted = {s.trace_id: s for s in served}
    index = {trace_id: i for i, trace_id in enumerate(steps.trace_ids)}
    columns = _Columns(steps)
    found = [
        each
        for trace in traces
        if trace.trace_id in wanted and (each := _request(wanted[trace.trace_id], trace, index, columns)) is not None
    ]
    return sorted(found, key=lambda r: -r.waited_ms)


class _Columns:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.sizes = steps.sizes
        self.parts = steps.parts
        self.waits = waited(steps)
        self.lost = imbalance(steps)
        self.tokens = np.add.reduceat(steps.tokens, steps.starts)


def _request(served: Served, trace: Trace, index: dict[str, int], columns: _Columns) -> RequestSteps | None:
    steps = columns.steps
    sums = np.zeros(len(PARTS))
    lasted = waits = lost = caused = 0.0
    counts = {a.PREFILL_SPAN: 0, a.DECODE_SPAN: 0}
    rank = -1
    on_demand = 0
    for span in trace.named(*counts):
        for link in span.links:
            step = index.get(link.trace_id)
            row = None if step is None else _own_row(columns, step, span)
            if step is None or row is None:
                continue
            counts[span.name] += 1
            on_demand += int(steps.on_demand[step])
            rank = int(steps.rank[row])
            sums += columns.parts[row]
            lasted += float(columns.parts[row].sum())
            waits += float(columns.waits[row])
            lost += float(columns.lost[step])
            caused += float(columns.lost[step]) * min(_tokens(span) / max(int(columns.tokens[step]), 1), 1.0)
    if rank < 0:
        return None
    return RequestSteps(
        trace_id=served.trace_id,
        arm=served.arm,
        tenant=served.tenant,
        rank=rank,
        prefill_steps=counts[a.PREFILL_SPAN],
        decode_steps=counts[a.DECODE_SPAN],
        on_demand=on_demand,
        step_ms=lasted,
        ms=[float(v) for v in sums],
        waited_ms=waits,
        imbalance_ms=lost,
        caused_ms=caused,
    )


def _own_row(columns: _Columns, step: int, span: Span) -> int | None:
    """The row of the first rank of the request's own engine."""
    first, size = int(columns.steps.starts[step]), int(columns.sizes[step])
    engine = integer(span.attributes.get(a.DP_RANK)) or 0
    rows = np.flatnonzero(columns.steps.engine[first : first + size] == engine)
    return first + int(rows[0]) if len(rows) else None


def _tokens(span: Span) -> float:
    """Tokens of the request in one of the span's steps, in the mean."""
    if span.name == a.DECODE_SPAN:
        return 1.0
    computed = integer(span.attributes.get(a.COMPUTED_TOKENS)) or integer(span.attributes.get(a.INPUT_TOKENS)) or 0
    return computed / max(integer(span.attributes.get(a.PREFILL_CHUNKS)) or 1, 1)
