"""The objects of the cluster that matter here, as they are now, and the versions of scalers that were passed on the
way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

from llmtrace.autoscale.kubernetes import pods as of_pods
from llmtrace.autoscale.kubernetes.api import Kind
from llmtrace.autoscale.kubernetes.objects import Object, get, name, namespace, quantity, selects, times, uid
from llmtrace.autoscale.kubernetes.pods import Pod, Replica
from llmtrace.autoscale.kubernetes.scalers import Rescale, Target, rescales

HPAS = Kind("autoscaling", "v2", "horizontalpodautoscalers")
SCALED_OBJECTS = Kind("keda.sh", "v1alpha1", "scaledobjects", optional=True)
VARIANTS = Kind("llmd.ai", "v1alpha1", "variantautoscalings", optional=True)
DEPLOYMENTS = Kind("apps", "v1", "deployments")
LEADER_WORKER_SETS = Kind("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", optional=True)
PODS = Kind("", "v1", "pods")
RESCALED = Kind("", "v1", "events", only="reason=SuccessfulRescale")
ACTIVATED = Kind("", "v1", "events", only="reason=KEDAScaleTargetActivated")
DEACTIVATED = Kind("", "v1", "events", only="reason=KEDAScaleTargetDeactivated")
PULLED = Kind("", "v1", "events", only="reason=Pulled")
DELETED = Kind("", "v1", "events", only="reason=SuccessfulDelete")
REFUSED = Kind("", "v1", "events", only="reason=FailedCreate")
# Pods come after what selects them, so that a list of them finds its place.
KINDS = (
    *(SCALED_OBJECTS, VARIANTS, DEPLOYMENTS, LEADER_WORKER_SETS, HPAS, PODS),
    *(RESCALED, ACTIVATED, DEACTIVATED, PULLED, DELETED, REFUSED),
)

GONE_KEPT_S = 3600.0
"""How long a pod that is no more is remembered."""
ACCELERATORS = (
    "nvidia.com/gpu",
    "amd.com/gpu",
    "gpu.intel.com/i915",
    "gpu.intel.com/xe",
    "habana.ai/gaudi",
    "google.com/tpu",
)
_DELETED_POD = re.compile(r"(?:Deleted pod: |delete Pod )(\S+)")


class Cluster:
    """Takes what the watches tell. Everything may be told twice, and late; times in nanoseconds since the epoch."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._objects: dict[Kind, dict[str, Object]] = {}
        self._pods: dict[str, Pod] = {}
        self._gone: dict[str, tuple[Pod, int]] = {}
        self._versions: list[Object] = []
        self._told = False

    @property
    def known(self) -> bool:
        """Whether every kind was listed once."""
        return all(kind in self._objects for kind in KINDS)

    # What the watches tell.

    def replace(self, kind: Kind, items: Iterable[Object]) -> None:
        """These are all objects of the kind."""
        self._told = True
        found = {uid(item): item for item in items}
        if kind == PODS:
            now = self._clock()
            for pod in [p for key, p in self._pods.items() if key not in found]:
                self._lose(pod, now)
            self._pods = {key: of_pods.read(item) for key, item in found.items()}
            found = {}
        elif kind == HPAS:
            self._versions += found.values()
        self._objects[kind] = found

    def change(self, kind: Kind, event: str, item: Object) -> None:
        """One object was ADDED, MODIFIED or DELETED."""
        self._told = True
        if kind == PODS:
            pod = of_pods.read(item)
            if event == "DELETED":
                self._lose(pod, self._clock())
            else:
                self._pods[pod.uid] = pod
            return
        kept = self._objects.setdefault(kind, {})
        if event == "DELETED":
            kept.pop(uid(item), None)
            return
        kept[uid(item)] = item
        if kind == HPAS:
            self._versions.append(item)

    def _lose(self, pod: Pod, now_ns: int) -> None:
        self._pods.pop(pod.uid, None)
        if pod.uid not in self._gone:
            self._gone[pod.uid] = pod, now_ns
        since = now_ns - int(GONE_KEPT_S * 1e9)
        self._gone = {key: entry for key, entry in self._gone.items() if entry[1] > since}

    # What is asked.

    def told(self) -> bool:
        """Whether anything was told since the last time."""
        told, self._told = self._told, False
        return told

    def versions(self) -> list[Object]:
        """The versions of HPAs that came since the last time, in order."""
        taken, self._versions = self._versions, []
        return taken

    def every(self, kind: Kind) -> list[Object]:
        """The objects of a kind."""
        return list(self._objects.get(kind, {}).values())

    def rescales(self) -> list[Rescale]:
        """What the events tell of changes of the number of replicas, in order of time."""
        events = [*self.every(RESCALED), *self.every(ACTIVATED), *self.every(DEACTIVATED)]
        found = (r for event in events for r in rescales(event))
        return sorted(found, key=lambda r: (r.time_ns, r.uid, r.desired))

    def workload(self, target: Target) -> Object | None:
        """The object that is scaled."""
        kind = LEADER_WORKER_SETS if target.kind == "LeaderWorkerSet" else DEPLOYMENTS
        return next((o for o in self.every(kind) if (namespace(o), name(o)) == (target.namespace, target.name)), None)

    def asked(self, target: Target) -> int:
        """How many replicas of it are asked for."""
        return int(get(self.workload(target), "spec", "replicas", default=1))

    def ready(self, target: Target) -> int:
        """How many of its replicas are ready."""
        return int(get(self.workload(target), "status", "readyReplicas", default=0))

    def replicas(self, target: Target) -> list[Replica]:
        """Its replicas, those too that are gone a short time."""
        workload = self.workload(target)
        if workload is None:
            return []
        own = self._selector(target, workload)
        candidates = [*self._pods.values(), *(pod for pod, _ in self._gone.values())]
        chosen = [p for p in candidates if p.namespace == target.namespace and selects(own, p.labels)]
        size = int(get(workload, "spec", "leaderWorkerTemplate", "size", default=1))
        return of_pods.replicas(target.kind, chosen, size)

    @staticmethod
    def _selector(target: Target, workload: Object) -> Object:
        if target.kind == "LeaderWorkerSet":
            return {"matchLabels": {of_pods.GROUP_LABELS[0]: target.name}}
        selector: Object = get(workload, "spec", "selector", default={})
        return selector

    def gone_ns(self, uids: Iterable[str]) -> int | None:
        """When the last of these pods was found to be no more; None while one is there, or none was ever seen."""
        times = [self._gone[key][1] if key in self._gone else None for key in uids]
        known = [t for t in times if t is not None]
        return max(known) if known and len(known) == len(times) else None

    def pulled_ns(self, pods: Iterable[Pod]) -> int | None:
        """When the last image of these pods was there, as far as events tell."""
        uids = {p.uid for p in pods}
        told = (of_pods.pulled(event) for event in self.every(PULLED))
        return max((entry[1] for entry in told if entry and entry[0] in uids), default=None)

    def deletions(self, target: Target) -> list[tuple[str, int]]:
        """Names and times of pods of a workload that were deleted, as events tell."""
        found = []
        for event in self.every(DELETED):
            said = _DELETED_POD.match(str(get(event, "message", default="")))
            time_ns = max(times(event), default=0)
            if said and namespace(event) == target.namespace and said[1].startswith(f"{target.name}-"):
                found.append((said[1], time_ns))
        return sorted(found, key=lambda entry: entry[1])

    def refusal(self, target: Target, since_ns: int) -> str:
        """Why no pod of a workload could be made since this time, as events tell."""
        told = [
            (max(times(event), default=0), str(get(event, "message", default="")))
            for event in self.every(REFUSED)
            if namespace(event) == target.namespace
            and str(get(event, "involvedObject", "name", default="")).startswith(target.name)
        ]
        return max((t for t in told if t[0] >= since_ns), default=(0, ""))[1]

    def accelerators(self, target: Target, otherwise: float) -> float:
        """Accelerators of a replica, by the limits of its containers; ``otherwise`` where they say none."""
        workload = self.workload(target)
        if target.kind == "LeaderWorkerSet":
            template = get(workload, "spec", "leaderWorkerTemplate", default={})
            worker = _accelerators(get(template, "workerTemplate"))
            leader = _accelerators(get(template, "leaderTemplate")) if get(template, "leaderTemplate") else worker
            return leader + worker * (int(get(template, "size", default=1)) - 1) or otherwise
        return _accelerators(get(workload, "spec", "template")) or otherwise


def _accelerators(template: Object | None) -> float:
    containers = get(template, "spec", "containers", default=[]) if template else []
    limits = [get(c, "resources", "limits", default={}) for c in containers]
    return sum(quantity(limit.get(key)) or 0.0 for limit in limits for key in ACCELERATORS)
