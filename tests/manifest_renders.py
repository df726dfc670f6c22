"""What kustomize makes of the manifests, rendered once for all tests; each gets a copy of its own."""

from __future__ import annotations

import copy
from functools import cache

from manifests.checks.render import Object
from manifests.checks.render import render as build

PD = "scenarios/pd-disaggregation"
WIDE_EP = "scenarios/wide-ep"
AUTOSCALING = "scenarios/autoscaling"


def rendered(overlay: str, *components: str) -> list[Object]:
    return copy.deepcopy(_once(overlay, components))


@cache
def _once(overlay: str, components: tuple[str, ...]) -> list[Object]:
    return build(overlay, components)


def find(items: list[Object], kind: str, name: str) -> Object:
    """The object of that kind whose name is ``name``, or ``name`` with the hash of a generated ConfigMap."""
    (found,) = [
        item
        for item in items
        if item["kind"] == kind
        and (item["metadata"]["name"] == name or item["metadata"]["name"].rpartition("-")[0] == name)
    ]
    return found


def pod(items: list[Object], kind: str, name: str) -> Object:
    """The pod's spec of a workload."""
    spec = find(items, kind, name)["spec"]
    template = spec["leaderWorkerTemplate"]["workerTemplate"] if kind == "LeaderWorkerSet" else spec["template"]
    return dict(template["spec"])


def variables(container: Object, pod_ip: str = "127.0.0.1") -> dict[str, str]:
    """A container's environment as the kubelet makes it, with fields of the pod made up."""
    made: dict[str, str] = {}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None:
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            value = pod_ip if field == "status.podIP" else f"some-{variable['name'].lower().replace('_', '-')}"
        for name, known in made.items():
            value = value.replace(f"$({name})", known)
        made[variable["name"]] = value
    return made
