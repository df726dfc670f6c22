"""What is wrong with the trace of one step, and with a request's links to its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from llmtrace.scenarios.expectation import Fault, Problem
from llmtrace.scenarios.facts import integer, number
from llmtrace.scenarios.wide_ep.steps import ATTRIBUTES
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.tempo import TempoClient

TOLERANCE_MS = 0.1
"""How much longer the phases may be than their step: both are rounded."""


HINT = "is llmtrace in every worker, and LLMTRACE_STEP_EVERY small enough that a short request meets a traced step?"


def link_problems(trace: Trace, _arm: str, stack: Stack) -> list[Problem]:
    """What is wrong with a request's links to the engine's steps, and with the steps, which are read from the store."""
    with TempoClient(stack.store) as store:
        return list(_link_problems(trace, store.trace))


def _link_problems(trace: Trace, read: Callable[[str], Trace | None]) -> Iterator[Problem]:
    def problem(fault: Fault, message: str) -> Problem:
        return Problem(trace_id=trace.trace_id, fault=fault, component="engine", message=message, hint=HINT)

    links = [link for span in trace.named(a.PREFILL_SPAN, a.DECODE_SPAN) for link in span.links]
    if not links and trace.named(a.PREFILL_SPAN):
        yield problem(Fault.MISSING, "no span links to a step of the engine")
    for link in links:
        step = read(link.trace_id)
        if step is None or link.span_id not in step.by_id:
            yield problem(Fault.MISSING, f"the step {link.trace_id} to which it links has no span {link.span_id}")
            continue
        for fault in step_faults(step):
            yield problem(Fault.COUNT, f"step {link.trace_id}: {fault}")


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
