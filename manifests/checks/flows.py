"""Which pods may talk to which by the NetworkPolicies, as Kubernetes adds them up: a flow needs the leave of both ends.

A flow that only one end allows is a mistake of the other: either traffic that is dropped, or a door nobody uses.
Peers outside of what is rendered (the Kubernetes API, DNS, KEDA, a model hub) have no other end to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manifests.checks.pods import Pod, matches, pods
from manifests.checks.render import Object, name_of


@dataclass(frozen=True, order=True)
class Flow:
    """From one kind of pods to another; the ports as the policy writes them, ``*`` for all."""

    source: str
    target: str
    ports: str


def _side(items: Sequence[Object], everybody: Sequence[Pod], direction: str) -> Iterator[Flow]:
    """The flows that the policies of one end allow: ``ingress`` or ``egress``."""
    key = {"ingress": "from", "egress": "to"}[direction]
    for policy in (item for item in items if item["kind"] == "NetworkPolicy"):
        namespace = policy["metadata"]["namespace"]
        selected = [
            pod
            for pod in everybody
            if pod.namespace == namespace and matches(policy["spec"]["podSelector"], dict(pod.labels))
        ]
        for rule in policy["spec"].get(direction, ()):
            for peer in rule.get(key, ()):
                for other in everybody:
                    if not _is(peer, other, namespace):
                        continue
                    for pod in selected:
                        ends = (other.name, pod.name) if direction == "ingress" else (pod.name, other.name)
                        for port in rule.get("ports", ({"port": "*"},)):
                            yield Flow(*ends, _ports(port))


def _is(peer: Object, pod: Pod, namespace: str) -> bool:
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], dict(pod.namespace_labels)):
            return False
    elif pod.namespace != namespace:
        return False
    return matches(peer.get("podSelector", {}), dict(pod.labels))


def _ports(port: Object) -> str:
    return f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])


def allowed(items: Sequence[Object], direction: str) -> set[Flow]:
    """The flows that one end allows."""
    return set(_side(items, pods(items), direction))


def _covers(flow: Flow, others: set[Flow]) -> bool:
    """Whether ``others`` allow what ``flow`` does, perhaps among more."""
    for other in others:
        if (other.source, other.target) != (flow.source, flow.target):
            continue
        if other.ports in {"*", flow.ports}:
            return True
        first, _, last = other.ports.partition("-")
        if last and "-" not in flow.ports and flow.ports != "*" and int(first) <= int(flow.ports) <= int(last):
            return True
    return False


def both_ways(items: Sequence[Object]) -> set[Flow]:
    """The flows that really pass: allowed at both ends."""
    ingress, egress = allowed(items, "ingress"), allowed(items, "egress")
    return {flow for flow in egress if _covers(flow, ingress)} | {flow for flow in ingress if _covers(flow, egress)}


def violations(items: Sequence[Object]) -> Iterator[str]:
    """One sentence for each flow that has one end only, and for each namespace whose default is not deny."""
    for item in items:
        if item["kind"] == "Namespace" and not any(
            policy["metadata"]["namespace"] == item["metadata"]["name"]
            and policy["spec"]["podSelector"] == {}
            and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
            and "ingress" not in policy["spec"]
            for policy in items
            if policy["kind"] == "NetworkPolicy"
        ):
            yield f"{name_of(item)} has no NetworkPolicy that denies by default"
    ingress, egress = allowed(items, "ingress"), allowed(items, "egress")
    for flow in sorted(egress):
        if not _covers(flow, ingress):
            yield f"{flow.source} may send to {flow.target}:{flow.ports}, which does not take it"
    for flow in sorted(ingress):
        if not _covers(flow, egress):
            yield f"{flow.target} takes {flow.ports} from {flow.source}, which may not send it"
