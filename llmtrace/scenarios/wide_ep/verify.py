"""What is wrong with the trace of one step, and with a request's links to its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmtrace.errors import UserError
from llmtrace.scenarios.expectation import Fault, Problem
from llmtrace.scenarios.facts import integer, number
from llmtrace.scenarios.wide_ep.steps import ATTRIBUTES, Steps, read_steps
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Link, Span, Trace
from llmtrace.traces.tempo import TempoClient

TOLERANCE_MS = 0.1
"""How much longer the phases may be than their step: both are rounded."""
OTHER_SHARE, OTHER_MS = 0.8, 100.0
"""How much of a step the phases may leave, as a share and in any case. It is preparing the batch: some milliseconds,
which is the larger part of a small model's step, and many more where a process waits for its processor."""

HINT = "is llmtrace in every worker, and LLMTRACE_STEP_EVERY small enough that a short request meets a traced step?"


def link_problems(trace: Trace, _arm: str, stack: Stack) -> list[Problem]:
    """What is wrong with a request's links to the engine's steps, and with the steps, which are read from the store."""
    with TempoClient(stack.store) as store:
        return list(_link_problems(trace, store.trace))


def _link_problems(trace: Trace, read: Callable[[str], Trace | None]) -> Iterator[Problem]:
    def problem(fault: Fault, message: str) -> Problem:
        return Problem(trace_id=trace.trace_id, fault=fault, component="engine", message=message, hint=HINT)

    links = step_links(trace)
    if not links and trace.named(a.PREFILL_SPAN):
        yield problem(Fault.MISSING, "no span links to a step of the engine")
    for link in links:
        step = read(link.trace_id)
        if step is None or link.span_id not in step.by_id:
            yield problem(Fault.MISSING, f"the step {link.trace_id} to which it links has no span {link.span_id}")
            continue
        for fault in step_faults(step):
            yield problem(Fault.COUNT, f"step {link.trace_id}: {fault}")


def step_links(trace: Trace) -> list[Link]:
    """From a request to the engine's steps."""
    return [link for span in trace.named(a.PREFILL_SPAN, a.DECODE_SPAN) for link in span.links]


def step_faults(trace: Trace) -> list[str]:
    """A sentence for each fault of a step's trace; none for the trace of something else."""
    spans = trace.named(a.STEP_SPAN)
    if not spans:
        return []
    found = [*_rank_faults(spans), *_unsaid(spans)]
    if found:
        return found
    try:
        steps = read_steps([trace])
    except UserError:
        return ["its ranks do not agree on how many they are, or what should be a number is none"]
    return [fault for _, fault in phase_faults(steps)]


def phase_faults(steps: Steps) -> Iterator[tuple[str, str]]:
    """The trace id of a step and a sentence, for each rank whose phases do not make up its part of the step."""
    told, lasted = steps.phases.sum(axis=1), steps.duration
    # A dummy step may have experts rearranged within it, which is none of the phases.
    least = np.where(steps.dummy, 0.0, lasted - np.maximum(OTHER_SHARE * lasted, OTHER_MS))
    for row in np.flatnonzero((told > lasted + TOLERANCE_MS) | (told < least) | (told <= 0.0)):
        yield (
            steps.trace_ids[int(np.searchsorted(steps.starts, row, side="right")) - 1],
            f"the phases of rank {steps.rank[row]} take {told[row]:.1f} ms, its step {lasted[row]:.1f} ms",
        )
    silent = np.isnan(steps.phases[:, 0])
    for step in np.flatnonzero(np.logical_or.reduceat(silent, steps.starts)):
        rows = slice(steps.starts[step], steps.starts[step] + steps.sizes[step])
        if not silent[rows].all():
            ranks = ", ".join(map(str, steps.rank[rows][silent[rows]]))
            yield steps.trace_ids[step], f"these ranks do not say their phases, and others do: {ranks}"


def _rank_faults(spans: Sequence[Span]) -> Iterator[str]:
    counts = Counter(integer(span.attributes.get(a.WORLD_RANK)) for span in spans)
    ranks = integer(spans[0].attributes.get(a.STEP_RANKS)) or 0
    if missing := [rank for rank in range(ranks) if rank not in counts]:
        yield f"{ranks} ranks stepped, and these sent no span: {', '.join(map(str, missing))}"
    for rank, count in counts.items():
        if count > 1:
            yield f"rank {rank} sent {count} spans"


def _unsaid(spans: Sequence[Span]) -> Iterator[str]:
    """Where CUDA graphs are replayed a span says no phases; one that says some of them is wrong."""
    for span in spans:
        unsaid = [name for name in ATTRIBUTES if number(span.attributes.get(name)) is None]
        if len(unsaid) < len(ATTRIBUTES):
            for name in unsaid:
                yield f"rank {span.attributes.get(a.WORLD_RANK)} does not say {name}"
