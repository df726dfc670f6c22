"""What became of a decision's replicas: phases, outcomes and reasons, from pods and events as they are."""

from __future__ import annotations

import pytest
from kubernetes_objects import deployment, event, hpa, leader_worker_set, member, ns, pod, pulled

from llmtrace.autoscale.kubernetes import scalers
from llmtrace.autoscale.kubernetes.cluster import (
    DELETED,
    DEPLOYMENTS,
    LEADER_WORKER_SETS,
    PODS,
    PULLED,
    REFUSED,
    Cluster,
)
from llmtrace.autoscale.kubernetes.ledger import Known, Ledger, Prices, State, Watched
from llmtrace.autoscale.kubernetes.progress import Patience, Progress
from llmtrace.semconv import attributes as a

PATIENCE = Patience(ready_s=600, first_request_s=60, settle_s=30)


class Scene:
    """A cluster, and one decision that is followed."""

    def __init__(self, current: int, desired: int, *, kind: str = "Deployment", size: int = 1, store: bool = False):
        self.now = ns(400)
        self.cluster = Cluster(lambda: self.now)
        self.cluster.replace(DEPLOYMENTS, [deployment(desired)] if kind == "Deployment" else [])
        self.cluster.replace(LEADER_WORKER_SETS, [leader_worker_set(desired, size)] if kind != "Deployment" else [])
        book = Ledger(State(since_ns=ns(-100)), Prices())
        found = book.take(scalers.read(hpa(current, desired, 10, kind=kind), [], []), ns(11), 1)
        assert found is not None
        self.decision: Watched = found
        self.progress = Progress(self.cluster, PATIENCE, store=store)

    def follow(self, time: float, *, later: Known | None = None) -> None:
        up = self.decision.direction == a.SCALE_UP
        taken = {uid if up else f"-{uid}" for uids in self.decision.uids for uid in uids}
        self.progress.follow(self.decision, taken, later, ns(time))

    def done(self, time: float) -> bool:
        return self.progress.done(self.decision, None, ns(time))


def phases(decision: Watched, number: int = 0) -> dict[str, tuple[int, int]]:
    return {
        p.name: (p.start_ns // 10**9 - ns(0) // 10**9, p.end_ns // 10**9 - ns(0) // 10**9)
        for p in decision.replicas[number].phases
    }


def test_the_phases_of_a_start_follow_one_another_from_the_decision_on():
    scene = Scene(1, 2)
    scene.cluster.replace(PULLED, [pulled("vllm-b", 55)])
    scene.cluster.replace(PODS, [pod("vllm-a", -500, -499, -450, -400), pod("vllm-b", 11, 14, 57, 120)])
    scene.follow(121)
    assert phases(scene.decision) == {
        "pod.schedule": (10, 14),
        "image.pull": (14, 55),
        "container.start": (55, 57),
        "ready": (57, 120),
    }
    assert [p.source for p in scene.decision.replicas[0].phases] == ["conditions", "events", "conditions", "conditions"]
    assert scene.decision.replicas[0].outcome == a.OUTCOME_READY
    assert scene.done(121)


def test_a_trace_is_sent_when_a_time_has_passed_and_all_replicas_are_known():
    scene = Scene(1, 3)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 12, 13, 14)])
    scene.follow(15)
    assert not scene.done(20)
    assert not scene.done(100)  # One is missing still.
    scene.cluster.change(PODS, "ADDED", pod("vllm-c", 12, 13, 14, 15))
    scene.follow(101)
    assert scene.done(101)


def test_a_pod_belongs_to_one_decision():
    scene = Scene(1, 2)
    scene.cluster.replace(PODS, [pod("vllm-b", 11), pod("vllm-c", 11)])
    scene.progress.follow(scene.decision, {"vllm-b"}, None, ns(12))
    assert [r.name for r in scene.decision.replicas] == ["vllm-c"]


def test_pods_that_were_made_before_the_next_decision_are_found_however_late_one_looks():
    scene = Scene(1, 2)
    # Nobody watched: the pod of this decision, that of the next one, and one of much later.
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 12, 13, 14), pod("vllm-c", 31, 32, 33, 34), pod("vllm-d", 200)])
    scene.follow(300, later=Known(id="x", time_ns=ns(30), desired=3))
    assert [(r.name, r.outcome) for r in scene.decision.replicas] == [("vllm-b", a.OUTCOME_READY)]


def test_a_decision_that_was_taken_back_before_its_pods_were_made_has_none_of_later_ones():
    scene = Scene(1, 2)
    scene.cluster.replace(PODS, [pod("vllm-b", 50, 52, 53, 54)])
    scene.follow(35, later=Known(id="x", time_ns=ns(30), desired=1))
    assert scene.decision.replicas == []


def test_with_a_store_a_replica_waits_for_its_first_request():
    scene = Scene(1, 2, store=True)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 14, 20, 50)])
    scene.follow(60)
    (record,) = scene.decision.replicas
    assert scene.progress.waits_for_request(record)
    scene.progress.served(record, ns(58))
    assert (record.outcome, phases(scene.decision)["first_request"]) == (a.OUTCOME_SERVED, (50, 58))


def test_a_replica_without_a_request_is_unused_after_a_while():
    scene = Scene(1, 2, store=True)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 14, 20, 50)])
    scene.follow(141)
    (record,) = scene.decision.replicas
    assert (record.outcome, record.ended_ns) == (a.OUTCOME_UNUSED, ns(110))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            pod("vllm-b", 11, unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "Insufficient nvidia.com/gpu",
        ),
        (pod("vllm-b", 11, 12, waiting="ImagePullBackOff"), "ImagePullBackOff"),
    ],
)
def test_a_replica_that_never_gets_ready_says_why(made, reason):
    scene = Scene(1, 2)
    scene.cluster.replace(PODS, [made])
    scene.follow(600)
    assert scene.decision.replicas[0].outcome is None
    scene.follow(611)
    (record,) = scene.decision.replicas
    assert record.outcome == a.OUTCOME_FAILED
    assert "not ready within 600 s" in record.failure
    assert reason in record.failure
    assert scene.done(611)


def test_a_pod_that_could_not_be_made_says_why():
    scene = Scene(1, 2)
    about = {"kind": "ReplicaSet", "namespace": "llm-d", "name": "vllm-5d4f", "uid": "rs"}
    scene.cluster.replace(
        REFUSED, [event("FailedCreate", 'pods "vllm-5d4f-x" is forbidden: exceeded quota: gpus', 12, about)]
    )
    scene.follow(611)
    (record,) = scene.decision.replicas
    assert record.outcome == a.OUTCOME_FAILED
    assert "exceeded quota: gpus" in record.failure


def test_a_replica_that_a_later_decision_takes_back_is_withdrawn():
    scene = Scene(1, 2)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 12)])
    scene.follow(12)
    scene.cluster.replace(DEPLOYMENTS, [deployment(1)])
    scene.cluster.change(PODS, "MODIFIED", pod("vllm-b", 11, 12, deleted=30))
    scene.follow(31, later=Known(id="x", time_ns=ns(30), desired=1))
    assert scene.decision.replicas[0].outcome == a.OUTCOME_WITHDRAWN


def test_a_replica_that_is_deleted_and_still_wanted_failed():
    scene = Scene(1, 2)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 12)])
    scene.follow(12)
    scene.cluster.replace(PODS, [])
    scene.follow(31)
    (record,) = scene.decision.replicas
    assert (record.outcome, record.failure.split(";")[0]) == (a.OUTCOME_FAILED, "the pod was deleted")


def test_a_ready_replica_keeps_its_phases_when_its_pod_ends():
    scene = Scene(1, 2, store=True)
    scene.cluster.replace(PODS, [pod("vllm-b", 11, 14, 20, 50)])
    scene.follow(51)
    scene.cluster.change(PODS, "MODIFIED", pod("vllm-b", 11, 14, 20, None, deleted=60))
    scene.follow(61)
    (record,) = scene.decision.replicas
    assert (record.outcome, phases(scene.decision)["ready"]) == (a.OUTCOME_UNUSED, (20, 50))


def test_a_stop_is_the_time_from_the_order_to_the_end_of_the_containers():
    scene = Scene(2, 1)
    scene.cluster.replace(PODS, [pod("vllm-a", -500, -499, -450, -400), pod("vllm-b", -50, -40, -30, -20)])
    scene.follow(11)
    assert scene.decision.replicas == []
    scene.cluster.change(PODS, "MODIFIED", pod("vllm-b", -50, -40, -30, -20, deleted=11))
    scene.follow(12)
    assert scene.decision.replicas[0].outcome is None
    scene.cluster.change(PODS, "MODIFIED", pod("vllm-b", -50, -40, -30, None, deleted=11, ended=25))
    scene.follow(26)
    assert (scene.decision.replicas[0].outcome, phases(scene.decision)) == (a.OUTCOME_DRAINED, {"drain": (11, 25)})
    assert [p.source for p in scene.decision.replicas[0].phases] == [a.SOURCE_CONDITIONS]


def test_a_container_that_had_to_be_killed_is_cut():
    scene = Scene(2, 1)
    scene.cluster.replace(PODS, [pod("vllm-b", -50, -40, -30, None, deleted=11, ended=41, exit_code=137)])
    scene.follow(42)
    assert scene.decision.replicas[0].outcome == a.OUTCOME_CUT


def test_a_pod_whose_end_was_not_seen_took_no_longer_than_it_may():
    scene = Scene(2, 1)
    scene.cluster.replace(PODS, [pod("vllm-b", -50, -40, -30, None, deleted=11)])
    scene.follow(12)
    scene.cluster.replace(PODS, [])
    scene.follow(500)
    (record,) = scene.decision.replicas
    assert record.outcome == a.OUTCOME_DRAINED
    assert record.ended_ns == ns(11 + 30 + 1)
    assert [p.source for p in record.phases] == [a.SOURCE_PROBE]


def test_pods_that_went_while_nobody_watched_are_known_by_events():
    scene = Scene(2, 1)
    about = {"kind": "ReplicaSet", "namespace": "llm-d", "name": "vllm-5d4f", "uid": "rs"}
    scene.cluster.replace(DELETED, [event("SuccessfulDelete", "Deleted pod: vllm-5d4f-b", 11, about)])
    scene.cluster.replace(PODS, [pod("vllm-a", -500, -499, -450, -400)])
    scene.follow(45)
    assert [(r.name, r.outcome) for r in scene.decision.replicas] == [("vllm-5d4f-b", a.OUTCOME_DRAINED)]
    assert scene.done(45)


def test_pods_that_go_later_are_not_of_this_decision():
    scene = Scene(2, 1)
    scene.cluster.replace(PODS, [pod("vllm-b", -50, -40, -30, -20, deleted=100)])
    scene.follow(101)
    assert scene.decision.replicas == []
    assert scene.done(101)


def test_a_replica_of_a_leader_worker_set_is_ready_with_its_last_pod():
    scene = Scene(1, 2, kind="LeaderWorkerSet", size=2)
    scene.cluster.replace(
        PODS, [member(0, 0, -50, -40, -30, -20), member(0, 1, -50, -40, -30, -20), member(1, 0, 11, 12, 20, 50)]
    )
    scene.follow(51)
    assert [r.name for r in scene.decision.replicas] == ["vllm-1"]
    assert scene.decision.replicas[0].outcome is None
    scene.cluster.change(PODS, "ADDED", member(1, 1, 12, 16, 30, 90))
    scene.follow(91)
    assert phases(scene.decision) == {"pod.schedule": (10, 16), "container.start": (16, 30), "ready": (30, 90)}


def test_a_decision_that_changes_nothing_has_no_replicas():
    scene = Scene(1, 2)
    scene.decision.direction = a.SCALE_HOLD
    scene.decision.desired = 1
    scene.cluster.replace(PODS, [pod("vllm-b", 11)])
    scene.follow(12)
    assert scene.decision.replicas == []
    assert scene.done(41)
