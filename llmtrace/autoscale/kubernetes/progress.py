"""What became of the replicas of a decision, read from the cluster as it is: how far each start and each stop is."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrace.autoscale.kubernetes.cluster import Cluster
from llmtrace.autoscale.kubernetes.ledger import SECOND, Known, Watched
from llmtrace.autoscale.kubernetes.objects import get
from llmtrace.autoscale.kubernetes.pods import Replica
from llmtrace.autoscale.record import ReplicaRecord
from llmtrace.semconv import attributes as a

SLACK_NS = 2 * SECOND
"""Times are whole seconds, and pods may be made before the status says why."""
UNSEEN = "no pod was made"


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds: for a replica to become ready; for its first request; after a decision until its
    trace is sent; for pods of a decision that a later one took back; for pods to be told to end."""

    ready_s: float = 1800.0
    first_request_s: float = 60.0
    settle_s: float = 30.0
    overtaken_s: float = 10.0
    deletion_s: float = 60.0


class Progress:
    """Follows the decisions that are open; ``store`` says whether first requests can be asked for."""

    def __init__(self, cluster: Cluster, patience: Patience, *, store: bool) -> None:
        self._cluster = cluster
        self._patience = patience
        self._store = store

    def follow(self, decision: Watched, taken: set[str], later: Known | None, now_ns: int) -> None:
        """Bring a decision's replicas up to date.

        ``taken`` are the pods that belong to decisions already, those of this one added; ``later`` is the scaler's
        next decision.
        """
        if decision.direction == a.SCALE_HOLD:
            return
        up = decision.direction == a.SCALE_UP
        there = self._cluster.replicas(decision.target)
        self._assign(decision, there, taken, up, self._until(decision, later))
        by_uid = {uid: replica for replica in there for uid in replica.uids}
        for record, uids in zip(decision.replicas, decision.uids, strict=False):
            if record.outcome is None:
                replica = next((by_uid[uid] for uid in uids if uid in by_uid), None)
                if up:
                    self._start(decision, record, replica, uids, now_ns)
                else:
                    self._stop(record, replica, uids, now_ns)
        if self._given_up(decision, later, now_ns):
            self._complete(decision, later, now_ns)

    def done(self, decision: Watched, later: Known | None, now_ns: int) -> bool:
        """Whether everything about a decision is known."""
        settled = now_ns >= decision.time_ns + self._patience.settle_s * SECOND
        whole = len(decision.replicas) >= decision.wanted or self._given_up(decision, later, now_ns)
        return settled and whole and not decision.open

    def served(self, record: ReplicaRecord, first_token_ns: int) -> None:
        """A replica gave its first token."""
        record.phase(a.FIRST_REQUEST_SPAN, first_token_ns, a.SOURCE_SPANS)
        record.end(a.OUTCOME_SERVED, first_token_ns)

    def waits_for_request(self, record: ReplicaRecord) -> bool:
        """Whether a replica is ready, and its first request is still to come."""
        return record.up and record.outcome is None and _ready_ns(record) is not None

    # Which replicas.

    def _assign(self, decision: Watched, there: list[Replica], taken: set[str], up: bool, until: int) -> None:
        """Find the replicas that the decision starts or stops: those made or told to end between it and ``until``."""
        since = decision.time_ns - SLACK_NS
        for replica in sorted(there, key=lambda r: (r.created_ns if up else r.deleting_ns or 0, r.name)):
            if len(decision.replicas) >= decision.wanted:
                return
            time_ns = replica.created_ns if up else replica.deleting_ns or self._cluster.gone_ns(replica.uids)
            own = {f"-{uid}" if not up else uid for uid in replica.uids}
            if time_ns is None or not since <= time_ns <= until or own & taken:
                continue
            taken |= own
            started = decision.time_ns if up else max(time_ns, decision.time_ns)
            decision.replicas.append(ReplicaRecord(name=replica.name, up=up, started_ns=started))
            decision.uids.append(sorted(replica.uids))
        if not up:
            self._assign_unseen(decision, since, until)

    def _assign_unseen(self, decision: Watched, since: int, until: int) -> None:
        """Pods that went while nobody watched: events have their names and when they were told to end."""
        seen = {r.name for r in decision.replicas}
        for name, time_ns in self._cluster.deletions(decision.target):
            if len(decision.replicas) >= decision.wanted:
                return
            if name in seen or not since <= time_ns <= until or self._there(decision, name):
                continue
            record = ReplicaRecord(name=name, up=False, started_ns=max(time_ns, decision.time_ns))
            record.phase(a.DRAIN_SPAN, time_ns, a.SOURCE_EVENTS)
            record.end(a.OUTCOME_DRAINED, time_ns)
            decision.replicas.append(record)
            decision.uids.append([])

    def _there(self, decision: Watched, name: str) -> bool:
        return any(name in {p.name for p in r.pods} for r in self._cluster.replicas(decision.target))

    def _until(self, decision: Watched, later: Known | None) -> int:
        """Until when replicas of this decision may come."""
        patience = self._patience
        longest = patience.ready_s if decision.direction == a.SCALE_UP else patience.deletion_s
        until = decision.time_ns + int(longest * SECOND)
        return until if later is None else min(until, later.time_ns + int(patience.overtaken_s * SECOND))

    def _given_up(self, decision: Watched, later: Known | None, now_ns: int) -> bool:
        """Whether no more replicas of this decision will come."""
        return now_ns > self._until(decision, later)

    def _complete(self, decision: Watched, later: Known | None, now_ns: int) -> None:
        """Say of replicas that never came why, where nothing took them back."""
        missing = decision.wanted - len(decision.replicas)
        if decision.direction != a.SCALE_UP or later is not None or missing <= 0:
            return
        why = self._cluster.refusal(decision.target, decision.time_ns - SLACK_NS)
        for number in range(missing):
            record = ReplicaRecord(
                name=f"{decision.target.name}-missing-{number}", up=True, started_ns=decision.time_ns
            )
            record.phase(a.SCHEDULE_SPAN, now_ns, a.SOURCE_CONDITIONS)
            record.end(a.OUTCOME_FAILED, now_ns, f"{UNSEEN}{f': {why}' if why else ''}")
            decision.replicas.append(record)
            decision.uids.append([])

    # A start.

    def _start(
        self, decision: Watched, record: ReplicaRecord, replica: Replica | None, uids: list[str], now_ns: int
    ) -> None:
        if replica is not None:
            self._phases(record, replica)
        ready_ns = _ready_ns(record)
        going = replica.deleting_ns if replica else None
        gone_ns = self._cluster.gone_ns(uids) if replica else now_ns
        left_ns = min((t for t in (going, gone_ns) if t is not None), default=None)
        if ready_ns is None:
            self._not_ready(decision, record, replica, left_ns, now_ns)
        elif left_ns is not None:
            record.end(a.OUTCOME_UNUSED, max(left_ns, ready_ns))
        elif not self._store:
            record.end(a.OUTCOME_READY, ready_ns)
        elif now_ns > ready_ns + (self._patience.first_request_s + self._patience.settle_s) * SECOND:
            record.end(a.OUTCOME_UNUSED, ready_ns + int(self._patience.first_request_s * SECOND))

    def _not_ready(
        self, decision: Watched, record: ReplicaRecord, replica: Replica | None, left_ns: int | None, now_ns: int
    ) -> None:
        trouble = replica.trouble if replica else ""
        late = now_ns > decision.time_ns + self._patience.ready_s * SECOND
        if left_ns is None and not late:
            return
        end_ns = left_ns if left_ns is not None else now_ns
        if not record.phases:
            record.phase(a.SCHEDULE_SPAN, end_ns, a.SOURCE_CONDITIONS)
        if left_ns is not None and self._fewer_wanted(decision):
            record.end(a.OUTCOME_WITHDRAWN, end_ns)
            return
        what = f"not ready within {self._patience.ready_s:g} s" if left_ns is None else "the pod was deleted"
        record.end(a.OUTCOME_FAILED, end_ns, f"{what}{f'; {trouble}' if trouble else ''}")

    def _fewer_wanted(self, decision: Watched) -> bool:
        return int(get(self._cluster.workload(decision.target), "spec", "replicas", default=0)) < decision.desired

    def _phases(self, record: ReplicaRecord, replica: Replica) -> None:
        """The phases that are over, from the pods' conditions and their containers' states."""
        scheduled = replica.last(p.scheduled_ns for p in replica.pods)
        started = replica.last(p.started_ns for p in replica.pods)
        ready = replica.last(p.ready_ns for p in replica.pods)
        pulled = self._cluster.pulled_ns(replica.pods)
        if _ready_ns(record) is not None:
            return
        record.phases = []
        if scheduled is None:
            return
        record.phase(a.SCHEDULE_SPAN, scheduled, a.SOURCE_CONDITIONS)
        if started is None:
            return
        if pulled is not None:
            record.phase(a.IMAGE_PULL_SPAN, min(pulled, started), a.SOURCE_EVENTS)
        record.phase(a.CONTAINER_START_SPAN, started, a.SOURCE_CONDITIONS)
        if ready is not None:
            record.phase(a.READY_SPAN, ready, a.SOURCE_CONDITIONS)

    # A stop.

    def _stop(self, record: ReplicaRecord, replica: Replica | None, uids: list[str], now_ns: int) -> None:
        """A stop is over when the containers have ended, or the pods are no more."""
        gone_ns = self._cluster.gone_ns(uids) if replica else now_ns
        ended = replica.last(p.ended_ns for p in replica.pods) if replica else None
        if gone_ns is None and ended is None:
            return
        end_ns = ended if ended is not None else gone_ns or now_ns
        if replica is not None and ended is None:
            # A pod that is gone had the time that it was given, no more.
            end_ns = min(end_ns, max(record.started_ns + max(p.grace_ns for p in replica.pods) + SECOND, 0))
        killed = replica is not None and any(p.killed for p in replica.pods)
        record.phase(a.DRAIN_SPAN, end_ns, a.SOURCE_PROBE if ended is None else a.SOURCE_CONDITIONS)
        record.end(a.OUTCOME_CUT if killed else a.OUTCOME_DRAINED, end_ns)


def _ready_ns(record: ReplicaRecord) -> int | None:
    return next((p.end_ns for p in record.phases if p.name == a.READY_SPAN), None)
