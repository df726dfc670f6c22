"""What pods tell of their start and their end, and which of them make up a replica.

Conditions and container states are those of core/v1, events those of kubelet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmtrace.autoscale.kubernetes.objects import Object, condition, get, name, namespace, nanoseconds, times, uid

GROUP_LABELS = ("leaderworkerset.sigs.k8s.io/name", "leaderworkerset.sigs.k8s.io/group-index")
"""Labels of LeaderWorkerSet's pods: the set, and the replica, which is a group of pods."""
_KILLED = 137
"""Exit code of a container that had not ended when its time was up."""


@dataclass(frozen=True)
class Pod:
    """A pod. Times in nanoseconds since the epoch, None where it is not so yet.

    ``deleting_ns`` is when it was told to end, ``grace_ns`` how long it may take; ``ended_ns`` when its last
    container did. ``trouble`` is why it is not ready, as far as its status says.
    """

    uid: str
    namespace: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    created_ns: int = 0
    scheduled_ns: int | None = None
    started_ns: int | None = None
    ready_ns: int | None = None
    deleting_ns: int | None = None
    grace_ns: int = 0
    ended_ns: int | None = None
    killed: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class Replica:
    """A replica: a pod, or the ``size`` pods of a group. Each time is that of the last of its pods."""

    name: str
    pods: tuple[Pod, ...]
    size: int = 1

    @property
    def uids(self) -> frozenset[str]:
        """Its pods' uids."""
        return frozenset(p.uid for p in self.pods)

    @property
    def created_ns(self) -> int:
        """When its first pod was made."""
        return min(p.created_ns for p in self.pods)

    def last(self, times: Iterable[int | None]) -> int | None:
        """The last of its pods' times; None while a pod has none, or is missing."""
        known = [t for t in times if t is not None]
        return max(known) if len(known) >= max(self.size, len(self.pods)) else None

    @property
    def deleting_ns(self) -> int | None:
        """When the first of its pods was told to end."""
        return min((p.deleting_ns for p in self.pods if p.deleting_ns is not None), default=None)

    @property
    def trouble(self) -> str:
        """What the pod that has trouble says."""
        return next((f"{p.name}: {p.trouble}" if self.size > 1 else p.trouble for p in self.pods if p.trouble), "")


def read(pod: Object) -> Pod:
    """Read a pod's object."""
    statuses = get(pod, "status", "containerStatuses", default=[])
    starts = [nanoseconds(get(s, "state", "running", "startedAt")) for s in statuses]
    ends = [get(s, "state", "terminated", default={}) for s in statuses]
    finished = [nanoseconds(get(e, "finishedAt")) for e in ends]
    grace_ns = int(get(pod, "metadata", "deletionGracePeriodSeconds", default=0)) * 10**9
    deletion = nanoseconds(get(pod, "metadata", "deletionTimestamp"))
    known_starts = [s for s in starts if s is not None]
    known_ends = [f for f in finished if f is not None]
    return Pod(
        uid=uid(pod),
        namespace=namespace(pod),
        name=name(pod),
        labels=get(pod, "metadata", "labels", default={}),
        created_ns=nanoseconds(get(pod, "metadata", "creationTimestamp")) or 0,
        scheduled_ns=_since(pod, "PodScheduled"),
        started_ns=max(known_starts) if statuses and len(known_starts) == len(statuses) else None,
        ready_ns=_since(pod, "Ready"),
        # deletionTimestamp is when its time will be up.
        deleting_ns=None if deletion is None else deletion - grace_ns,
        grace_ns=grace_ns,
        ended_ns=max(known_ends) if statuses and len(known_ends) == len(statuses) else None,
        killed=deletion is not None and any(get(e, "exitCode") == _KILLED for e in ends),
        trouble=_trouble(pod, statuses),
    )


def replicas(kind: str, pods: Iterable[Pod], size: int) -> list[Replica]:
    """The replicas of a workload that its pods make up, in the order in which they were made."""
    if kind != "LeaderWorkerSet":
        found = [Replica(p.name, (p,)) for p in pods]
    else:
        # A group that is made anew has the same name, and other pods.
        groups: dict[tuple[str, bool], list[Pod]] = {}
        for pod in pods:
            label = "-".join(pod.labels.get(key, "") for key in GROUP_LABELS)
            groups.setdefault((label, pod.deleting_ns is not None), []).append(pod)
        found = [Replica(key[0], tuple(sorted(group, key=lambda p: p.name)), size) for key, group in groups.items()]
    return sorted(found, key=lambda r: (r.created_ns, r.name))


def pulled(event: Object) -> tuple[str, int] | None:
    """The pod and the time of an event Pulled; None where it is of an init container, or is none."""
    about = get(event, "involvedObject", default={})
    path = str(get(about, "fieldPath", default=""))
    time_ns = max(times(event), default=None)
    if get(about, "kind") != "Pod" or not path.startswith("spec.containers") or time_ns is None:
        return None
    return str(get(about, "uid", default="")), time_ns


def _since(pod: Object, kind: str) -> int | None:
    found = condition(pod, kind)
    return nanoseconds(get(found, "lastTransitionTime")) if get(found, "status") == "True" else None


def _trouble(pod: Object, statuses: list[Object]) -> str:
    scheduled = condition(pod, "PodScheduled")
    if get(scheduled, "status") == "False":
        return f"{get(scheduled, 'reason', default='not scheduled')}: {get(scheduled, 'message', default='')}"
    if get(pod, "status", "phase") == "Failed":
        return f"{get(pod, 'status', 'reason', default='Failed')}: {get(pod, 'status', 'message', default='')}"
    waiting = [*get(pod, "status", "initContainerStatuses", default=[]), *statuses]
    for status in waiting:
        ended = get(status, "lastState", "terminated", default={}) or get(status, "state", "terminated", default={})
        last = f"; it ended with {get(ended, 'reason')} ({get(ended, 'exitCode')})" if ended else ""
        if reason := get(status, "state", "waiting", "reason"):
            said = get(status, "state", "waiting", "message", default="")
            return f"{get(status, 'name')}: {reason}{f': {said}' if said else ''}{last}"
        if last and get(ended, "exitCode") != 0:
            return f"{get(status, 'name')}{last}"
    ready = condition(pod, "Ready")
    return str(get(ready, "message", default="")) if get(ready, "status") == "False" else ""
