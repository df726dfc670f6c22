"""The answer of the autoscaling scenario: each decision, the requests behind it, what waiting cost, what it brought."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError
from llmtrace.scenarios.autoscaling.arms import NAME, REPORTS
from llmtrace.scenarios.autoscaling.decisions import Decision, in_order
from llmtrace.scenarios.autoscaling.effects import SECOND, DecisionAnswer, Effects, Waits
from llmtrace.scenarios.autoscaling.requests import Counted, RequestTable, read_all
from llmtrace.scenarios.checks import Check, check
from llmtrace.scenarios.facts import Block
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Demand, Unit, demand
from llmtrace.traces.model import Trace

POINTS = 400
"""Of the timeline."""
MOST_TOLD = 2000
"""Requests of which the answer tells the decisions that they led to."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Moment(_Model):
    """A moment of the timeline; ``at_s`` is seconds since its start."""

    at_s: float
    waiting: int
    running: int
    desired: int
    ready: int


class KindAnswer(_Model):
    """The requests of one kind: how many, how many of them a decision was due to, and their waits at the gateway."""

    kind: str
    requests: int
    drivers: int
    wait_user_s: float
    longest_wait_s: float


class Attribution(_Model):
    """How well the decisions' requests are those that the workload means to be: of the kind that drives the scaler.

    ``precision`` is the share of them that are, None without any; ``recall`` the share of that kind's requests
    waiting or running when decisions were taken, as far as the metric counts them, that are among them.
    """

    attributed: int
    of_driving_kind: int
    precision: float | None
    recall: float | None


class AutoscalingAnswer(_Model):
    """The whole answer. ``led_to`` has the ids of decisions by the trace id of a request that drove them."""

    scenario: Literal["autoscaling"] = "autoscaling"
    run_id: str
    model: str
    requests: int
    start_ns: int
    seconds: float
    decisions: list[DecisionAnswer]
    kinds: list[KindAnswer]
    attribution: Attribution
    led_to: dict[str, list[str]]
    timeline: list[Moment]
    accelerator_s: float
    cost: float
    verdict: str
    checks: list[Check]
    notes: list[str]


def answer(run_id: str, traces: Iterable[Trace]) -> AutoscalingAnswer:
    """Compute the answer from the traces of a run and those of the scaler's decisions of the same time.

    Raises UserError where there is no request.
    """
    table, found, blocks, model = read_all(traces)
    if not len(table):
        raise UserError(f"the store has no measured requests of run {run_id}; run `llmtrace run {NAME}` again")
    decisions = in_order(found)
    effects = Effects(table, decisions)
    answers = [effects.answer(number) for number in range(len(decisions))]
    driven, led_to = _led_to(table, decisions, effects)
    start_ns, end_ns = _span(table, decisions)
    notes = [] if decisions else ["the store has no decision of this time: does the scaler run and send its traces?"]
    if (drove := int(driven.sum())) > len(led_to):
        notes.append(f"led_to has the first {len(led_to):,} of the {drove:,} requests that drove decisions")
    if untold := sorted({d.metric for d in decisions if d.driven and d.query and demand(d.query).part is None}):
        notes.append(f"not attributable: no single requests are in {', '.join(untold)}, which drove decisions")
    if any(d.missing for d in decisions):
        notes.append("some decisions had to do without some of their metrics")
    return AutoscalingAnswer(
        run_id=run_id,
        model=model,
        requests=len(table),
        start_ns=start_ns,
        seconds=(end_ns - start_ns) / SECOND,
        decisions=answers,
        kinds=list(_kinds(table, driven)),
        attribution=_attribution(table, decisions, effects, driven),
        led_to=led_to,
        timeline=_timeline(table, decisions, start_ns, end_ns),
        accelerator_s=sum(d.accelerator_s for d in answers),
        cost=sum(d.cost for d in answers),
        verdict=_verdict(answers, effects.waits_for_more()),
        checks=list(_checks(table, blocks, decisions, effects)),
        notes=notes,
    )


def _span(table: RequestTable, decisions: Sequence[Decision]) -> tuple[int, int]:
    starts = [int(table.arrived.min()), *(d.time_ns for d in decisions)]
    ends = [int(table.ended.max()), *(d.end_ns for d in decisions)]
    return min(starts), max(ends)


def _led_to(
    table: RequestTable, decisions: Sequence[Decision], effects: Effects
) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], dict[str, list[str]]]:
    """Which requests drove any decision, and of the first of them which."""
    driven = np.zeros(len(table), dtype=np.bool_)
    led_to: dict[str, list[str]] = {}
    for decision in decisions:
        if not decision.driven:
            continue
        rows = effects.drivers(decision)
        driven[rows] = True
        for row in rows:
            trace_id = table.trace_ids[row]
            if trace_id in led_to or len(led_to) < MOST_TOLD:
                led_to.setdefault(trace_id, []).append(decision.id)
    return driven, led_to


def _kinds(table: RequestTable, driven: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[KindAnswer]:
    waits = (table.dispatched - table.arrived) / SECOND
    for number, name in enumerate(table.kind_names):
        mine = table.kinds == number
        yield KindAnswer(
            kind=name or "(not of the workload)",
            requests=int(mine.sum()),
            drivers=int((mine & driven).sum()),
            wait_user_s=float(waits[mine].sum()),
            longest_wait_s=float(waits[mine].max()),
        )


def _attribution(
    table: RequestTable,
    decisions: Sequence[Decision],
    effects: Effects,
    driven: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> Attribution:
    wanted = table.kinds == (table.kind_names.index(REPORTS) if REPORTS in table.kind_names else -1)
    attributed = int(driven.sum())
    right = int((driven & wanted).sum())
    should = np.zeros(len(table), dtype=np.bool_)
    counted: dict[Demand, Counted] = {}
    for decision in decisions:
        if decision.driven and decision.query:
            asked = demand(decision.query)
            if asked not in counted:
                counted[asked] = Counted.make(table, np.flatnonzero(wanted), asked)
            should[counted[asked].within(*decision.window)] = True
    due = int(should.sum())
    return Attribution(
        attributed=attributed,
        of_driving_kind=right,
        precision=right / attributed if attributed and wanted.any() else None,
        recall=int((should & driven).sum()) / due if due else None,
    )


def _timeline(table: RequestTable, decisions: Sequence[Decision], start_ns: int, end_ns: int) -> list[Moment]:
    times = np.linspace(start_ns, end_ns, POINTS).astype(np.int64)
    waiting = table.waiting.count(times)
    # Between waiting and its end a request runs.
    everything = np.searchsorted(np.sort(table.arrived), times, side="right")
    running = everything - np.searchsorted(np.sort(table.ended), times, side="right") - waiting
    desired = np.full(POINTS, decisions[0].current if decisions else 0)
    ready = np.full(POINTS, decisions[0].ready if decisions else 0)
    for decision in decisions:
        desired[times >= decision.time_ns] = decision.desired
        for replica in decision.replicas:
            if replica.up and replica.ready_ns is not None:
                ready[times >= replica.ready_ns] += 1
            elif not replica.up and (replica.running is not None or replica.cut is not None):
                ready[times >= replica.start_ns] -= 1
    return [
        Moment(at_s=(int(t) - start_ns) / SECOND, waiting=int(w), running=int(r), desired=int(d), ready=max(int(y), 0))
        for t, w, r, d, y in zip(times, waiting, running, desired, ready, strict=True)
    ]


def _verdict(decisions: Sequence[DecisionAnswer], waits: Waits) -> str:
    if not decisions:
        return "No decision was taken."
    ups = [d for d in decisions if d.direction == a.SCALE_UP]
    downs = [d for d in decisions if d.direction == a.SCALE_DOWN]
    limited = [d for d in decisions if d.limit == a.LIMITED_MAX]
    parts = [f"{len(decisions)} decisions: {len(ups)} up, {len(downs)} down; {len(limited)} limited by the maximum"]
    if useful := [d.useful_s for d in ups if d.useful_s is not None]:
        parts.append(
            f"a scale-up was useful after {float(np.median(useful)):.0f} s (median), while requests waited "
            f"{waits.user_s:,.0f} user-seconds ({waits.token_s:,.0f} token-seconds)"
        )
    helped = sum(d.verdict == "helped" for d in ups)
    if ups:
        parts.append(f"{helped} of {len(ups)} helped")
    if failed := sum(len(d.failures) for d in decisions):
        parts.append(f"{failed} replicas never became ready")
    if flaps := sum(d.flapping for d in decisions):
        parts.append(f"{flaps} decisions flapped")
    if ups:
        parts.append(
            f"warm replicas would have saved at most {waits.warm_pool_s:,.0f} user-seconds, a prediction "
            f"{waits.prediction_s:,.0f}"
        )
    return "; ".join(parts) + "."


def _checks(
    table: RequestTable, blocks: Sequence[Block], decisions: Sequence[Decision], effects: Effects
) -> Iterator[Check]:
    expected = sum(b.requests for b in blocks)
    if expected:
        yield Check(
            name="every request that was sent has its trace",
            ok=len(table) == expected,
            compared=expected,
            detail=f"{len(table)} traces of {expected} requests",
            disagreements=[],
        )
    yield _values(decisions, effects)
    yield _links(table, decisions, effects)
    yield _unbroken(decisions)


def _values(decisions: Sequence[Decision], effects: Effects) -> Check:
    """The metric, as Prometheus had it, against the requests' traces.

    At some moment of the window as many were there.
    """
    differ, compared = [], 0
    for d in decisions:
        asked = demand(d.query)
        if d.value is None or asked.part is None or asked.unit is not Unit.REQUESTS:
            continue
        low, high = effects.counted(d.query).overlaps.extremes(*d.window)
        compared += 1
        # Requests are whole; Kubernetes rounds their average over the replicas.
        if not low - 0.5 < d.value < high + 0.5:
            differ.append(f"{d.id}: {d.metric} {d.value:g}, by the traces {low} to {high}")
    return check("the metric and the requests that it counts", compared, differ, "as many as the traces tell")


def _links(table: RequestTable, decisions: Sequence[Decision], effects: Effects) -> Check:
    """The scaler's own links against the attribution from all traces."""
    known = set(table.trace_ids) if any(d.links for d in decisions) else set()
    differ, compared = [], 0
    for d in decisions:
        links = d.links & known
        if not links:
            continue
        compared += len(links)
        if others := links - {table.trace_ids[row] for row in effects.drivers(d)}:
            differ.append(f"{d.id}: {len(others)} of {len(links)} linked requests are not among its drivers")
    return check("the scaler's links and the requests' own times", compared, differ, "every linked request drove it")


def _unbroken(decisions: Sequence[Decision]) -> Check:
    """Each decision begins with the number of replicas with which the one before ended: none is lost."""
    last: dict[str, Decision] = {}
    differ, compared = [], 0
    for d in decisions:
        before = last.get(d.scaler)
        if before is not None:
            compared += 1
            if before.desired != d.current:
                differ.append(f"{d.id} begins with {d.current} replicas, {before.id} ended with {before.desired}")
        last[d.scaler] = d
    return check("each decision begins where the one before ended", compared, differ, "no decision is missing")
