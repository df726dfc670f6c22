"""What is wrong with the trace of one step: ranks that are missing, phases that do not fit into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from llmtrace.scenarios.facts import integer, number
from llmtrace.scenarios.wide_ep.steps import ATTRIBUTES
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Span, Trace

TOLERANCE_MS = 0.1
"""How much longer the phases may be than their step: both are rounded."""


def step_faults(trace: Trace) -> list[str]:
    """A sentence for each fault of a step's trace; none for the trace of something else."""
    return list(_faults(trace.named(a.STEP_SPAN)))


def _faults(spans: list[Span]) -> Iterator[str]:
    if not spans:
        return
    counts = Counter(integer(span.attributes.get(a.WORLD_RANK)) for span in spans)
    ranks = integer(spans[0].attributes.get(a.STEP_RANKS)) or 0
    if missing := [rank for rank in range(ranks) if rank not in counts]:
        yield f"{ranks} ranks stepped, and these sent no span: {', '.join(map(str, missing))}"
    for rank, count in counts.items():
        if count > 1:
            yield f"rank {rank} sent {count} spans"
    for span in spans:
        yield from _phase_faults(span)


def _phase_faults(span: Span) -> Iterator[str]:
    rank = span.attributes.get(a.WORLD_RANK)
    phases = {name: number(span.attributes.get(name)) for name in ATTRIBUTES}
    told = [value for value in phases.values() if value is not None]
    for name, value in phases.items():
        if value is None:
            yield f"rank {rank} does not say {name}"
    if sum(told) > span.duration_ms + TOLERANCE_MS:
        yield f"the phases of rank {rank} take {sum(told):.1f} ms, its step {span.duration_ms:.1f} ms"
