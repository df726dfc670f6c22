"""What each decision cost and brought.

Waiting, the time until its replicas were useful, accelerator time, the queue after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.autoscaling.decisions import PHASES, Decision, Replica
from llmtrace.scenarios.autoscaling.requests import Counted, RequestTable
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Demand, Unit, demand

SECOND = 1_000_000_000
LEAST_WINDOW_S, MOST_WINDOW_S = 10.0, 60.0
"""How long the queue is looked at before and after a replica became useful: as long as that took, within these."""
FLAP_S = 600.0
"""A change that is taken back, and the way back taken back too, within this time is flapping."""
EMPTY = 0.5
"""Fewer requests than this waiting, on average, is no queue."""
MOST_EXAMPLES = 8

Verdict = Literal[
    "helped", "came too late", "did not help", "never ready", "restored", "limited", "harmless", "cut requests", "held"
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class ReplicaAnswer(_Model):
    """A replica that a decision started. Times in seconds; ``phases`` by name, None of ``useful_s`` where it served
    nothing.

    ``accelerator_s`` is its cost until it was stopped or, with ``still_running``, until the end of what was looked at.
    """

    name: str
    outcome: str
    failure: str
    phases: dict[str, float]
    useful_s: float | None
    accelerator_s: float
    still_running: bool


class DrainAnswer(_Model):
    """A replica that a decision stopped, and the requests on it: then, when it was stopped, and those that failed there
    and ended well on another one. None where nobody counted."""

    name: str
    outcome: str
    running: int | None
    cut: int | None
    moved: int | None


class DecisionAnswer(_Model):
    """One decision.

    ``driven`` says whether requests drove it, ``drivers`` are the requests that its metric counted when it was taken,
    ``examples`` the trace ids of those that were most of it: by their tokens where the metric is of tokens, and then
    ``driver_tokens`` is the sum of them; else by how long they were counted. Where ``attributable`` is false nobody can
    tell which requests the metric was made of. Waiting is at the gateway, of all requests.
    ``useful_s`` is the time from the decision until the first of its replicas gave a token, ``detection_s`` that from
    when requests began to wait until the decision.
    The waits in user-seconds and token-seconds are those from the decision until its replicas were useful, of a
    limited one until the next decision. ``queue_*`` are numbers of waiting requests: then, on average before its
    replicas were useful, and on average after. ``warm_pool_s`` and ``prediction_s`` are the most user-seconds of
    waiting that replicas in waiting, or a start when requests began to wait, could have saved.
    """

    id: str
    trace_id: str
    time_ns: int
    direction: str
    reason: str
    metric: str
    value: float | None
    target: float | None
    current: int
    desired: int
    maximum: int
    limit: str
    stabilization: str
    driven: bool
    attributable: bool
    drivers: int
    driver_tokens: int | None
    examples: list[str]
    wait_user_s: float
    wait_token_s: float
    detection_s: float
    useful_s: float | None
    replicas: list[ReplicaAnswer]
    drained: list[DrainAnswer]
    accelerator_s: float
    cost: float
    queue_then: int
    queue_before: float | None
    queue_after: float | None
    warm_pool_s: float
    prediction_s: float
    limited_s: float
    flapping: bool
    verdict: Verdict
    failures: list[str]


class Waits(NamedTuple):
    """Waiting until decisions took effect, and the most of it that warm replicas, or a prediction, would have saved."""

    user_s: float
    token_s: float
    warm_pool_s: float
    prediction_s: float


class Effects:
    """Computes the answers of decisions, all against the same requests."""

    def __init__(self, table: RequestTable, decisions: Sequence[Decision]) -> None:
        self._table = table
        self._decisions = decisions
        self._counted: dict[Demand, Counted] = {}
        last = [int(table.ended.max())] if len(table) else []
        self._end_ns = max([*last, *(d.end_ns for d in decisions)], default=0)
        self._stops: dict[str, list[int]] = {}
        for replica in (r for d in decisions for r in d.replicas if not r.up):
            self._stops.setdefault(replica.name, []).append(replica.end_ns)
        self._flapping = set(_flapping(decisions))

    def counted(self, query: str) -> Counted:
        """The requests that a query counts."""
        asked = demand(query)
        if asked not in self._counted:
            self._counted[asked] = Counted.make(self._table, self._table.of_model(asked.model), asked)
        return self._counted[asked]

    def drivers(self, decision: Decision) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """The rows of the requests that the decision's metric counted, those that were most of it first."""
        if not decision.query:
            return np.asarray([], dtype=np.intp)
        return self.counted(decision.query).within(*decision.window)

    def answer(self, number: int) -> DecisionAnswer:
        """The answer for the decision of this number."""
        decision = self._decisions[number]
        rows, waiting = self.drivers(decision), self._table.waiting
        asked = demand(decision.query)
        replicas = [self._replica(r, decision) for r in decision.replicas if r.up]
        useful_ns, ready_ns = decision.useful_ns, decision.ready_ns
        until_ns = self._until(number, useful_ns)
        onset_ns = waiting.onset(decision.time_ns)
        before, after = self._queue_around(decision, useful_ns)
        accelerator_s = sum(r.accelerator_s for r in replicas)
        return DecisionAnswer(
            id=decision.id,
            trace_id=decision.trace_id,
            time_ns=decision.time_ns,
            direction=decision.direction,
            reason=decision.reason,
            metric=decision.metric,
            value=decision.value,
            target=decision.target,
            current=decision.current,
            desired=decision.desired,
            maximum=decision.maximum,
            limit=decision.limit,
            stabilization=decision.stabilization,
            driven=decision.driven,
            attributable=asked.part is not None,
            drivers=len(rows),
            driver_tokens=int(self._table.prompt_tokens[rows].sum()) if asked.unit is Unit.TOKENS else None,
            examples=[self._table.trace_ids[row] for row in rows[:MOST_EXAMPLES]],
            wait_user_s=waiting.between(decision.time_ns, until_ns),
            wait_token_s=self._table.waiting_tokens.between(decision.time_ns, until_ns),
            detection_s=(decision.time_ns - onset_ns) / SECOND,
            useful_s=None if useful_ns is None else (useful_ns - decision.time_ns) / SECOND,
            replicas=replicas,
            drained=[
                DrainAnswer(name=r.name, outcome=r.outcome, running=r.running, cut=r.cut, moved=r.moved)
                for r in decision.replicas
                if not r.up
            ],
            accelerator_s=accelerator_s,
            cost=accelerator_s / 3600 * decision.price_per_hour,
            queue_then=waiting.at(decision.time_ns),
            queue_before=before,
            queue_after=after,
            warm_pool_s=waiting.between(decision.time_ns, ready_ns) if ready_ns else 0.0,
            prediction_s=waiting.between(onset_ns, ready_ns) if ready_ns else 0.0,
            limited_s=(self._next(number) - decision.time_ns) / SECOND if decision.limited else 0.0,
            flapping=decision.id in self._flapping,
            verdict=_verdict(decision, useful_ns, before, after),
            failures=[f"{r.name}: {r.failure}" for r in decision.replicas if r.outcome == a.OUTCOME_FAILED],
        )

    def waits_for_more(self) -> Waits:
        """The waits of all decisions that added replicas; what several of them have in common counts once."""
        until, warm, early = [], [], []
        for number, d in enumerate(self._decisions):
            if d.direction != a.SCALE_UP:
                continue
            until.append((d.time_ns, self._until(number, d.useful_ns)))
            if (ready_ns := d.ready_ns) is not None:
                warm.append((d.time_ns, ready_ns))
                early.append((self._table.waiting.onset(d.time_ns), ready_ns))
        waiting, tokens = self._table.waiting, self._table.waiting_tokens
        return Waits(
            user_s=sum(waiting.between(*part) for part in _merged(until)),
            token_s=sum(tokens.between(*part) for part in _merged(until)),
            warm_pool_s=sum(waiting.between(*part) for part in _merged(warm)),
            prediction_s=sum(waiting.between(*part) for part in _merged(early)),
        )

    def _next(self, number: int) -> int:
        """When the next decision of the same scaler was taken; the end of everything where there is none."""
        mine = self._decisions[number]
        later = (d.time_ns for d in self._decisions[number + 1 :] if d.scaler == mine.scaler)
        return next(later, max(self._end_ns, mine.time_ns))

    def _until(self, number: int, useful_ns: int | None) -> int:
        """Until when waiting is the decision's: its replicas were useful, or the next decision was taken."""
        decision = self._decisions[number]
        if decision.direction == a.SCALE_DOWN:
            return decision.time_ns
        if useful_ns is not None:
            return useful_ns
        return self._next(number) if decision.limited or any(r.up for r in decision.replicas) else decision.time_ns

    def _queue_around(self, decision: Decision, useful_ns: int | None) -> tuple[float | None, float | None]:
        """Waiting requests on average before and after the decision took effect; None where it never did."""
        at_ns = useful_ns
        if decision.direction == a.SCALE_DOWN:
            at_ns = decision.end_ns
        if at_ns is None:
            return None, None
        took_s = (at_ns - decision.time_ns) / SECOND
        window_ns = int(min(max(took_s, LEAST_WINDOW_S), MOST_WINDOW_S) * SECOND)
        waiting, seconds = self._table.waiting, window_ns / SECOND
        before = waiting.between(at_ns - window_ns, at_ns) / seconds
        return before, waiting.between(at_ns, at_ns + window_ns) / seconds

    def _replica(self, replica: Replica, decision: Decision) -> ReplicaAnswer:
        stopped = next((t for t in self._stops.get(replica.name, []) if t > replica.start_ns), None)
        if replica.outcome in (a.OUTCOME_FAILED, a.OUTCOME_WITHDRAWN):
            stopped = replica.end_ns
        end_ns = max(self._end_ns, replica.end_ns) if stopped is None else stopped
        useful = replica.useful_ns
        return ReplicaAnswer(
            name=replica.name,
            outcome=replica.outcome,
            failure=replica.failure,
            phases={
                name: (replica.phases[name][1] - replica.phases[name][0]) / SECOND
                for name in PHASES
                if name in replica.phases
            },
            useful_s=None if useful is None else (useful - decision.time_ns) / SECOND,
            accelerator_s=(end_ns - replica.start_ns) / SECOND * decision.accelerators,
            still_running=stopped is None,
        )


def _merged(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time in parts that do not overlap."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _flapping(decisions: Sequence[Decision]) -> list[str]:
    """The decisions that took back the one before and were taken back by the one after, both of them soon."""
    by_scaler: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.direction != a.SCALE_HOLD:
            by_scaler.setdefault(d.scaler, []).append(d)
    return [
        middle.id
        for mine in by_scaler.values()
        for before, middle, after in zip(mine, mine[1:], mine[2:], strict=False)
        if before.direction == after.direction != middle.direction and after.time_ns - before.time_ns <= FLAP_S * SECOND
    ]


def _verdict(decision: Decision, useful_ns: int | None, before: float | None, after: float | None) -> Verdict:
    if decision.direction == a.SCALE_DOWN:
        if any(r.cut or (r.cut is None and r.outcome == a.OUTCOME_CUT) for r in decision.replicas):
            return "cut requests"
        return "harmless" if (after or 0.0) < EMPTY or (after or 0.0) <= (before or 0.0) else "did not help"
    if not any(r.up for r in decision.replicas):
        return "limited" if decision.limited else "held"
    if all(r.outcome == a.OUTCOME_FAILED for r in decision.replicas):
        return "never ready"
    if decision.direction == a.SCALE_HOLD:
        return "restored"
    if useful_ns is None or before is None or after is None or before < EMPTY:
        return "came too late"
    return "helped" if after < 0.7 * before else "did not help"
