"""The pods that a set of objects leads to, and whom a label selector selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrace.errors import UserError
from manifests.checks.render import Object, workloads

GATEWAY = {"gateway.networking.k8s.io/gateway-name": "inference-gateway"}
"""The label of the pods that an implementation of the Gateway API makes for the Gateway; they are in no manifest."""


@dataclass(frozen=True)
class Pod:
    """A kind of pods, by the workload that makes them."""

    name: str
    namespace: str
    labels: tuple[tuple[str, str], ...]
    namespace_labels: tuple[tuple[str, str], ...]


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects ``labels``; the operators that the manifests use."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        if expression["operator"] != "In":
            raise UserError(
                f"the operator {expression['operator']} of a selector is not known here; add it to matches()"
            )
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def pods(items: Sequence[Object]) -> list[Pod]:
    """The workloads' pods and the gateway's."""
    spaces = {item["metadata"]["name"]: item["metadata"]["labels"] for item in items if item["kind"] == "Namespace"}

    def pod(name: str, namespace: str, labels: dict[str, str]) -> Pod:
        own = spaces.get(namespace, {}) | {"kubernetes.io/metadata.name": namespace}
        return Pod(name, namespace, tuple(sorted(labels.items())), tuple(sorted(own.items())))

    found = [
        pod(item["metadata"]["name"], item["metadata"]["namespace"], dict(template["metadata"]["labels"]))
        for item, template in workloads(items)
    ]
    found += [
        pod(item["metadata"]["name"], item["metadata"]["namespace"], GATEWAY)
        for item in items
        if item["kind"] == "Gateway"
    ]
    found += [
        pod(account, namespace, {"llm-d-router-gateway": account, "llm-d.ai/igw-mode": "llm-d-router-gateway"})
        for namespace, account in chart_accounts(items)
    ]
    # The Prometheus operator makes its pods by labels of its own.
    found += [
        pod(item["metadata"]["name"], item["metadata"]["namespace"], {"app.kubernetes.io/name": "prometheus"})
        for item in items
        if item["kind"] == "Prometheus"
    ]
    return found


def chart_accounts(items: Sequence[Object]) -> list[tuple[str, str]]:
    """Namespace and account of pickers that llm-d's chart makes: those of pools that a route names and nobody has."""
    pools = {
        (item["metadata"]["namespace"], item["metadata"]["name"]) for item in items if item["kind"] == "InferencePool"
    }
    routed = {
        (item["metadata"]["namespace"], backend["name"])
        for item in items
        if item["kind"] == "HTTPRoute"
        for rule in item["spec"]["rules"]
        for backend in rule["backendRefs"]
    }
    return [(namespace, f"{name}-epp") for namespace, name in sorted(routed - pools)]
