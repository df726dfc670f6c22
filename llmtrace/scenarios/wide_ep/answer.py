"""The wide-ep answer: where the steps' time goes, who waits for whom, and which experts are hot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.checks import Check, check, every_request_has_its_trace
from llmtrace.scenarios.facts import Served, read_blocks, read_requests
from llmtrace.scenarios.wide_ep.breakdown import Layer, Share, by_node, by_rank, slowest_layers
from llmtrace.scenarios.wide_ep.clocks import Skew, skews
from llmtrace.scenarios.wide_ep.experts import ExpertLoad, expert_load
from llmtrace.scenarios.wide_ep.requests import RequestSteps, request_steps
from llmtrace.scenarios.wide_ep.steps import Steps, read_steps
from llmtrace.scenarios.wide_ep.verify import step_faults
from llmtrace.scenarios.wide_ep.waiting import Straggler, balance_saving_ms, stragglers, waited
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
    :data:`MATRIX_EXPERTS`.
    """

    model_config = ConfigDict(frozen=True)
    steps: int
    on_demand: int
    partial: int
    ranks: int
    lasted_ms: float
    waited_ms: float
    saving_ms: float
    by_rank: list[Share]
    by_node: list[Share]
    layers: list[Layer]
    stragglers: list[Straggler]
    experts: ExpertLoad | None
    sent: list[list[int]]
    skews: list[Skew]


class WideEpAnswer(BaseModel):
    """The scenario's answer."""

    model_config = ConfigDict(frozen=True)
    run_id: str
    model: str
    verdict: str
    steps: StepsAnswer
    requests: list[RequestSteps]
    checks: list[Check]


def answer(run_id: str, traces: Iterable[Trace]) -> WideEpAnswer:
    """The answer from a run's traces and those of the steps that its requests link to; UserError without any."""
    traces = list(traces)
    blocks = read_blocks(traces)
    served = read_requests(traces)
    steps = read_steps(traces)
    found = analyse(steps)
    return WideEpAnswer(
        run_id=run_id,
        model=next((b.model for b in blocks if b.model), ""),
        verdict=verdict(found),
        steps=found,
        requests=request_steps(steps, served, traces),
        checks=[every_request_has_its_trace(served, blocks), *_checks(served, traces)],
    )


def analyse(found: Steps) -> StepsAnswer:
    """What the steps alone say."""
    steps = found.sampled()
    lasted = np.maximum.reduceat(steps.duration, steps.starts)
    waits = np.add.reduceat(waited(steps), steps.starts) / steps.sizes
    return StepsAnswer(
        steps=steps.count,
        on_demand=found.count - steps.count,
        partial=steps.partial,
        ranks=len(np.unique(steps.rank)),
        lasted_ms=float(lasted.sum()),
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
    if not found.stragglers:
        return "One rank steps alone: nobody waits."
    first = found.stragglers[0]
    share = found.waited_ms / found.lasted_ms
    if first.share > CLEAR_SHARE:
        place = f"in {first.phase}" if first.phase != "other" else "outside of the layers"
        who = (
            f"Rank {first.rank} on {first.node} comes last in {first.share:.0%} of the steps, and the others then wait "
            f"{first.delay_ms:.1f} ms for it; it is slower {place}."
        )
    else:
        who = (
            f"No rank is always last: the one that is so most costly, rank {first.rank} on {first.node}, "
            f"is in {first.share:.0%} of the steps."
        )
    return (
        f"{who} Waiting takes {share:.0%} of the steps' time; an even load of the experts would have saved "
        f"{found.saving_ms / found.lasted_ms:.0%} of it."
    )


def _checks(served: Sequence[Served], traces: Sequence[Trace]) -> list[Check]:
    known = {trace.trace_id: trace for trace in traces}
    linkless, lost, compared = [], [], 0
    for request in served:
        spans = known[request.trace_id].named(a.PREFILL_SPAN, a.DECODE_SPAN)
        links = [link for span in spans for link in span.links]
        if not links:
            linkless.append(f"{request.trace_id} ({request.arm})")
        for link in links:
            compared += 1
            step = known.get(link.trace_id)
            if step is None or link.span_id not in step.by_id:
                lost.append(f"{request.trace_id} links to {link.span_id} in {link.trace_id}, which is not there")
    stepped = [trace for trace in traces if trace.named(a.STEP_SPAN)]
    faulty = [f"{trace.trace_id}: {fault}" for trace in stepped for fault in step_faults(trace)]
    return [
        check("every request links to the steps that ran it", len(served), linkless, "each has links"),
        check("the steps that requests link to are there", compared, lost, "all of them"),
        check("a step has every rank, and its phases fit into it", len(stepped), faulty, "no fault"),
    ]
