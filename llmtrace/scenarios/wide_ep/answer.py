"""The wide-ep answer: where the steps' time goes, who waits for whom, and which experts are hot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.checks import Check, check, every_request_has_its_trace
from llmtrace.scenarios.facts import Served, read_blocks, read_requests
from llmtrace.scenarios.wide_ep.breakdown import Layer, Share, by_node, by_rank, slowest_layers
from llmtrace.scenarios.wide_ep.clocks import Skew, skews
from llmtrace.scenarios.wide_ep.experts import ExpertLoad, expert_load
from llmtrace.scenarios.wide_ep.requests import RequestSteps, request_steps
from llmtrace.scenarios.wide_ep.steps import PARTS, Steps, read_steps
from llmtrace.scenarios.wide_ep.verify import phase_faults, step_faults, step_links
from llmtrace.scenarios.wide_ep.waiting import START, Straggler, balance_saving_ms, stragglers, waited
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Trace

CLEAR_SHARE = 2 / 3
"""A rank that is last in more than this share of the steps is the straggler; otherwise the last one changes."""
MATRIX_EXPERTS = 256


class StepsAnswer(BaseModel):
    """What the steps alone say: those of the sample, for the ``on_demand`` more were traced because they were slow.
    Times in milliseconds; ``lasted_ms`` is all steps together, each as long as its longest span.

    ``waited_ms`` is what ranks waited for the last one, in the mean over ranks and summed over steps. ``saving_ms`` is
    what perfect balance of the experts would have saved. ``sent`` is ranks by experts, of the first
    :data:`MATRIX_EXPERTS`. Of the steps, ``unknown`` do not say their phases, and last ``unknown_ms``.
    """

    model_config = ConfigDict(frozen=True)
    steps: int
    on_demand: int
    partial: int
    unknown: int
    ranks: int
    lasted_ms: float
    unknown_ms: float
    waited_ms: float
    saving_ms: float
    by_rank: list[Share]
    by_node: list[Share]
    layers: list[Layer]
    stragglers: list[Straggler]
    experts: ExpertLoad | None
    sent: list[list[int]]
    skews: list[Skew]

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of PARTS that are worth showing: ``unknown``, the last one, only where there is such a step."""
        return PARTS if self.unknown else PARTS[:-1]

    def shown(self, ms: list[float]) -> list[float]:
        """Of times by part of PARTS, those of :attr:`parts`."""
        return ms[: len(self.parts)]


class WideEpAnswer(BaseModel):
    """The scenario's answer."""

    model_config = ConfigDict(frozen=True)
    run_id: str
    model: str
    verdict: str
    steps: StepsAnswer
    requests: list[RequestSteps]
    checks: list[Check]


class _Run:
    """The traces of a run, one pass: what is no step is kept, and of the steps only what is wrong with them.

    ``stepped`` counts the steps. ``expected`` are the spans that requests link to, by their step's trace, less those
    that are there.
    """

    def __init__(self, traces: Iterable[Trace]) -> None:
        self._traces = traces
        self.kept: list[Trace] = []
        self.stepped = 0
        self.faults: list[str] = []
        self.expected: dict[str, set[str]] = {}

    def steps(self) -> Iterator[Trace]:
        for trace in self._traces:
            if not trace.named(a.STEP_SPAN):
                self.kept.append(trace)
                for link in step_links(trace):
                    self.expected.setdefault(link.trace_id, set()).add(link.span_id)
                continue
            self.stepped += 1
            if expected := self.expected.get(trace.trace_id):
                expected.difference_update([span.span_id for span in trace.spans])
            yield trace

    def is_not_whole(self, trace: Trace) -> None:
        self.faults += [f"{trace.trace_id}: {fault}" for fault in step_faults(trace)]


def answer(run_id: str, traces: Iterable[Trace]) -> WideEpAnswer:
    """The answer from a run's traces and those of the steps that its requests link to; UserError without any.

    The steps come last. They are read one after the other and not kept, so ``traces`` may be a stream.
    """
    run = _Run(traces)
    steps = read_steps(run.steps(), run.is_not_whole)
    run.faults += [f"{trace_id}: {fault}" for trace_id, fault in phase_faults(steps)]
    blocks, served = read_blocks(run.kept), read_requests(run.kept)
    found = analyse(steps)
    return WideEpAnswer(
        run_id=run_id,
        model=next((b.model for b in blocks if b.model), ""),
        verdict=verdict(found),
        steps=found,
        requests=request_steps(steps, served, run.kept),
        checks=[every_request_has_its_trace(served, blocks), *_checks(served, run)],
    )


def analyse(found: Steps) -> StepsAnswer:
    """What the steps alone say."""
    steps = found.sampled()
    lasted = np.maximum.reduceat(steps.duration, steps.starts)
    waits = np.add.reduceat(waited(steps), steps.starts) / steps.sizes
    unknown = ~steps.phased
    return StepsAnswer(
        steps=steps.count,
        on_demand=found.count - steps.count,
        partial=steps.partial,
        unknown=int(unknown.sum()),
        ranks=len(np.unique(steps.rank)),
        lasted_ms=float(lasted.sum()),
        unknown_ms=float(lasted[unknown].sum()),
        waited_ms=float(waits.sum()),
        saving_ms=balance_saving_ms(steps),
        by_rank=by_rank(steps),
        by_node=by_node(steps),
        layers=slowest_layers(steps),
        stragglers=stragglers(steps),
        experts=expert_load(steps.expert_tokens),
        sent=[[int(n) for n in row[:MATRIX_EXPERTS]] for row in steps.sent],
        skews=skews(steps),
    )


def verdict(found: StepsAnswer) -> str:
    """Who is waited for, and what an even load would save, in two sentences."""
    if found.ranks < 2:
        return "One rank steps alone: nobody waits."
    saved = ""
    if found.unknown < found.steps:
        of = "those that say their phases" if found.unknown else "it"
        share = found.saving_ms / (found.lasted_ms - found.unknown_ms)
        saved = f"; an even load of the experts would have saved {share:.0%} of {of}"
    return f"{_last(found)} Waiting takes {found.waited_ms / found.lasted_ms:.0%} of the steps' time{saved}."


def _last(found: StepsAnswer) -> str:
    if not found.stragglers:
        return "No step says its phases, and no rank begins late: who is slow within a step is not known."
    first = found.stragglers[0]
    who, steps = f"{first.rank} on {first.node}" + (f" ({first.pod})" if first.pod else ""), "the steps"
    if found.unknown:
        steps += " that do not say their phases" if first.phase == START else " that say their phases"
    if first.share <= CLEAR_SHARE:
        share = f"{first.share:.0%} of {steps}"
        return f"No rank is always last: the one that is so most costly, rank {who}, is in {share}."
    where = {START: "begins late", "other": "is slower outside of the layers"}.get(
        first.phase, f"is slower in {first.phase}"
    )
    return (
        f"Rank {who} comes last in {first.share:.0%} of {steps}, and the others then wait "
        f"{first.delay_ms:.1f} ms for it; it {where}."
    )


def _checks(served: Sequence[Served], run: _Run) -> list[Check]:
    known = {trace.trace_id: trace for trace in run.kept}
    linkless, lost, compared = [], [], 0
    for request in served:
        links = step_links(known[request.trace_id])
        compared += len(links)
        if not links:
            linkless.append(f"{request.trace_id} ({request.arm})")
        lost += [
            f"{request.trace_id} links to {link.span_id} in {link.trace_id}, which is not there"
            for link in links
            if link.span_id in run.expected[link.trace_id]
        ]
    return [
        check("every request links to the steps that ran it", len(served), linkless, "each has links"),
        check("the steps that requests link to are there", compared, lost, "all of them"),
        check("a step has every rank, and its phases fit into it", run.stepped, run.faults, "no fault"),
    ]
