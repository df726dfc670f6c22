"""Objects as kube-apiserver 1.34 sends them, with what the watcher reads.

Shapes: autoscaling/v2 and the conditions of podautoscaler/horizontal.go; core/v1 pods and events as kubelet and the
controllers write them; keda.sh/v1alpha1; leaderworkerset.x-k8s.io/v1; llmd.ai/v1alpha1.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

START = 1_800_000_000
"""Seconds since the epoch: when the examples begin."""
NAMESPACE = "llm-d"
UID = "0d5f1f2e-57a5-4b4e-9c39-6f7b6d3c2a10"
METRIC = "llm_d_epp_flow_control_queue_size"


def at(seconds: float | None) -> str | None:
    """A Time: seconds after the start, whole."""
    return None if seconds is None else datetime.fromtimestamp(int(START + seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ns(seconds: float) -> int:
    return int(START + seconds) * 10**9


def condition(kind: str, status: str, reason: str, message: str = "", since: float = 0) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(since)}


def hpa(
    current: int,
    desired: int,
    scaled: float | None = None,
    *,
    told: float = 0,
    average: str | None = "2333m",
    able: str | None = None,
    limited: tuple[str, str] = ("False", "DesiredWithinRange"),
    active: tuple[str, str, str] = ("True", "ValidMetricFound", ""),
    maximum: int = 8,
    metric: str = METRIC,
    selector: dict[str, Any] | None = None,
    owner: dict[str, Any] | None = None,
    kind: str = "Deployment",
    uid: str = UID,
    created: float = -3600,
) -> dict[str, Any]:
    """An HPA with one external metric; without ``able`` a version that tells of a change where ``scaled`` is given."""
    able = able or ("SucceededRescale" if scaled is not None else "ReadyForNewScale")
    about = {"name": metric, "selector": selector or {"matchLabels": {"model_name": "llama"}}}
    status: dict[str, Any] = {
        "observedGeneration": 1,
        "currentReplicas": current,
        "desiredReplicas": desired,
        "conditions": [
            condition("AbleToScale", "True", able),
            condition("ScalingActive", *active[:2], active[2]),
            condition("ScalingLimited", *limited),
        ],
    }
    if scaled is not None:
        status["lastScaleTime"] = at(scaled)
    if average is not None:
        status["currentMetrics"] = [
            {"type": "External", "external": {"metric": about, "current": {"averageValue": average}}}
        ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {
            "name": "vllm",
            "namespace": NAMESPACE,
            "uid": uid,
            "creationTimestamp": at(created),
            "ownerReferences": [owner] if owner else [],
            "managedFields": [
                {"manager": "kubectl", "operation": "Update", "time": at(created)},
                {
                    "manager": "kube-controller-manager",
                    "operation": "Update",
                    "time": at(told),
                    "subresource": "status",
                },
            ],
        },
        "spec": {
            "scaleTargetRef": {
                "kind": kind,
                "name": "vllm",
                "apiVersion": "apps/v1" if kind == "Deployment" else "leaderworkerset.x-k8s.io/v1",
            },
            "minReplicas": 1,
            "maxReplicas": maximum,
            "metrics": [
                {
                    "type": "External",
                    "external": {"metric": about, "target": {"type": "AverageValue", "averageValue": "1"}},
                }
            ],
        },
        "status": status,
    }


def event(
    reason: str, message: str, time: float, about: dict[str, Any], *, first: float | None = None, count: int = 1
) -> dict[str, Any]:
    """A core/v1 event as the recorder of client-go writes it."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{about['name']}.{abs(hash((reason, message))):x}",
            "namespace": NAMESPACE,
            "uid": f"event-{reason}-{message}-{about.get('uid')}-{about.get('fieldPath')}",
        },
        "involvedObject": about,
        "reason": reason,
        "message": message,
        "source": {"component": "horizontal-pod-autoscaler"},
        "firstTimestamp": at(time if first is None else first),
        "lastTimestamp": at(time),
        "count": count,
        "type": "Normal",
        "eventTime": None,
    }


def rescale(
    size: int, time: float, *, reason: str | None = None, first: float | None = None, uid: str = UID
) -> dict[str, Any]:
    """The event SuccessfulRescale of the HPA."""
    why = (
        reason
        or f"external metric {METRIC}(&LabelSelector{{MatchLabels:map[string]string{{model_name: llama,}},"
        "MatchExpressions:[]LabelSelectorRequirement{},}) above target"
    )
    about = {"kind": "HorizontalPodAutoscaler", "namespace": NAMESPACE, "name": "vllm", "uid": uid}
    return event("SuccessfulRescale", f"New size: {size}; reason: {why}", time, about, first=first)


def pulled(pod: str, time: float, container: str = "vllm") -> dict[str, Any]:
    """Kubelet's event that an image is there."""
    about = {
        "kind": "Pod",
        "namespace": NAMESPACE,
        "name": pod,
        "uid": pod,
        "fieldPath": f"spec.containers{{{container}}}",
    }
    message = (
        'Successfully pulled image "vllm:v0.32.0" in 41.3s (41.3s including waiting). Image size: 9123456789 bytes.'
    )
    return event("Pulled", message, time, about)


def pod(
    name: str,
    created: float,
    scheduled: float | None = None,
    started: float | None = None,
    ready: float | None = None,
    *,
    deleted: float | None = None,
    ended: float | None = None,
    exit_code: int = 0,
    waiting: str | None = None,
    labels: dict[str, str] | None = None,
    uid: str | None = None,
    unschedulable: str = "",
) -> dict[str, Any]:
    """A pod of one container; its uid is its name, where none is given."""
    state: dict[str, Any] = {"waiting": {"reason": waiting or "ContainerCreating"}}
    if ended is not None:
        state = {
            "terminated": {
                "exitCode": exit_code,
                "reason": "Completed",
                "finishedAt": at(ended),
                "startedAt": at(started),
            }
        }
    elif started is not None:
        state = {"running": {"startedAt": at(started)}}
    place = (
        condition("PodScheduled", "True", "", since=scheduled)
        if scheduled is not None
        else condition("PodScheduled", "False", "Unschedulable", unschedulable, created)
    )
    met = ready is not None
    since = created if ready is None else ready
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "uid": uid or name,
        "labels": labels or {"app": "vllm", "pod-template-hash": "5d4f"},
        "creationTimestamp": at(created),
    }
    if deleted is not None:
        metadata |= {"deletionTimestamp": at(deleted + 30), "deletionGracePeriodSeconds": 30}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "status": {
            "phase": "Running" if started is not None else "Pending",
            "conditions": [
                place,
                condition(
                    "Ready",
                    str(met),
                    "" if met else "ContainersNotReady",
                    "" if met else "containers with unready status: [vllm]",
                    since,
                ),
                condition("ContainersReady", str(met), "" if met else "ContainersNotReady", since=since),
            ],
            "containerStatuses": []
            if scheduled is None
            else [{"name": "vllm", "ready": met, "started": met, "restartCount": 0, "state": state, "lastState": {}}],
        },
    }


def deployment(replicas: int, ready: int = 1, *, gpus: str | None = "2") -> dict[str, Any]:
    limits = {"nvidia.com/gpu": gpus, "memory": "64Gi"} if gpus else {}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "vllm", "namespace": NAMESPACE, "uid": "deployment"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "vllm"}},
            "template": {"spec": {"containers": [{"name": "vllm", "resources": {"limits": limits}}]}},
        },
        "status": {"replicas": replicas, "readyReplicas": ready},
    }


def leader_worker_set(replicas: int, size: int) -> dict[str, Any]:
    worker = {"spec": {"containers": [{"name": "vllm", "resources": {"limits": {"nvidia.com/gpu": "8"}}}]}}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "vllm", "namespace": NAMESPACE, "uid": "lws"},
        "spec": {"replicas": replicas, "leaderWorkerTemplate": {"size": size, "workerTemplate": worker}},
        "status": {"replicas": replicas, "readyReplicas": 1, "hpaPodSelector": "leaderworkerset.sigs.k8s.io/name=vllm"},
    }


def member(group: int, worker: int, created: float, *times: float) -> dict[str, Any]:
    """A pod of a LeaderWorkerSet's group: the leader is worker 0."""
    labels = {
        "leaderworkerset.sigs.k8s.io/name": "vllm",
        "leaderworkerset.sigs.k8s.io/group-index": str(group),
        "leaderworkerset.sigs.k8s.io/worker-index": str(worker),
    }
    return pod(f"vllm-{group}" if worker == 0 else f"vllm-{group}-{worker}", created, *times, labels=labels)


def scaled_object() -> dict[str, Any]:
    """A ScaledObject as in llm-d's guide workload-autoscaling."""
    query = 'sum(llm_d_epp_flow_control_queue_size{model_name="llama"})'
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "vllm-scaling", "namespace": NAMESPACE, "uid": "scaled-object"},
        "spec": {
            "scaleTargetRef": {"name": "vllm"},
            "triggers": [
                {"type": "prometheus", "name": "epp-queue-size", "metadata": {"query": query, "threshold": "1"}},
            ],
        },
    }


def owned_by_keda() -> dict[str, Any]:
    """What an HPA that KEDA made of it has."""
    return {
        "metric": "s0-prometheus",
        "selector": {"matchLabels": {"scaledobject.keda.sh/name": "vllm-scaling"}},
        "owner": {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "name": "vllm-scaling",
            "uid": "scaled-object",
        },
    }


def variant_autoscaling() -> dict[str, Any]:
    update = {"reason": "Optimizer solution: cost-optimal allocation", "numReplicasChanged": 2, "updateTime": at(0)}
    return {
        "apiVersion": "llmd.ai/v1alpha1",
        "kind": "VariantAutoscaling",
        "metadata": {"name": "vllm-variant", "namespace": NAMESPACE, "uid": "variant"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "vllm"}, "modelID": "llama"},
        "status": {"desiredOptimizedAlloc": {"numReplicas": 3, "lastUpdate": update}},
    }
