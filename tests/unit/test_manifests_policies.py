"""What is applied is as it should be; and what is broken is found: one change, one sentence that names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from manifest_renders import AUTOSCALING, PD, WIDE_EP, find, pod, rendered

from llmtrace.errors import UserError
from manifests.checks import flows, security, violations
from manifests.checks.flows import Flow
from manifests.checks.pods import matches
from manifests.checks.render import COMPONENTS, MANIFESTS, OVERLAYS, Object, build

VARIANTS = [(overlay, ()) for overlay in OVERLAYS] + [
    (scenario, (component,)) for component in COMPONENTS for scenario in (PD, WIDE_EP)
]


@pytest.mark.parametrize(("overlay", "components"), VARIANTS, ids=lambda part: "+".join(part) if part else "alone")
def test_what_is_applied_is_as_it_should_be(overlay: str, components: tuple[str, ...]) -> None:
    assert list(violations(rendered(overlay, *components))) == []


def test_every_folder_of_scenarios_and_components_is_checked() -> None:
    scenarios = ("autoscaling", "pd-disaggregation", "prefix-cache", "wide-ep")
    assert ["observability", *(f"scenarios/{name}" for name in scenarios)] == OVERLAYS
    assert sorted(path.name for path in (MANIFESTS / "components").iterdir() if path.is_dir()) == COMPONENTS


def test_components_go_together() -> None:
    together = (
        "several-gateways",
        "capture-content",
        "agent-host-queue",
        "cloud-aws",
        "model-cache",
        "rdma",
        "router-chart",
        "gateway-istio",
    )
    items = rendered(PD, *together)
    assert list(violations(items)) == []
    agent = pod(items, "DaemonSet", "collector-agent")
    assert "--config=/etc/otelcol/to-gateways.yaml" in agent["containers"][0]["args"]
    assert "--config=/etc/otelcol/capture-content.yaml" in agent["containers"][0]["args"]
    claims = find(items, "StatefulSet", "tempo")["spec"]["volumeClaimTemplates"]
    assert [claim["spec"]["storageClassName"] for claim in claims] == ["llmtrace"]


def test_what_does_not_build_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match="does not build"):
        build(MANIFESTS / "components")


def drop(kind: str, name: str, *path: str) -> Callable[[list[Object]], None]:
    """Take a field of a workload's first container away; of the container itself, so that it is gone."""

    def breaks(items: list[Object]) -> None:
        part = pod(items, kind, name)["containers"][0]
        for step in path[:-1]:
            part = part[step]
        del part[path[-1]]

    return breaks


def put(kind: str, name: str, value: object, *path: str) -> Callable[[list[Object]], None]:
    """Give a field of a workload's first container another value."""

    def breaks(items: list[Object]) -> None:
        part = pod(items, kind, name)["containers"][0]
        for step in path[:-1]:
            part = part.setdefault(step, {})
        part[path[-1]] = value

    return breaks


def remove(kind: str, name: str) -> Callable[[list[Object]], None]:
    return lambda items: items.remove(find(items, kind, name))


def host_path(items: list[Object]) -> None:
    pod(items, "DaemonSet", "collector-agent")["volumes"].append({"name": "root", "hostPath": {"path": "/"}})


def host_network(items: list[Object]) -> None:
    find(items, "DaemonSet", "collector-agent")["spec"]["template"]["spec"]["hostNetwork"] = True


def seccomp(items: list[Object]) -> None:
    del pod(items, "StatefulSet", "tempo")["securityContext"]["seccompProfile"]


def wildcard(items: list[Object]) -> None:
    find(items, "Role", "prometheus")["rules"][0]["resources"] = ["*"]


def secrets(items: list[Object]) -> None:
    find(items, "ClusterRole", "llmtrace-collector-agent")["rules"][0]["resources"] = ["secrets"]


def writes(items: list[Object]) -> None:
    find(items, "Role", "llm-d-epp")["rules"][0]["verbs"] = ["get", "delete"]


def no_door(items: list[Object]) -> None:
    del find(items, "NetworkPolicy", "tempo")["spec"]["ingress"][0]


def no_way_out(items: list[Object]) -> None:
    rules = find(items, "NetworkPolicy", "model-server")["spec"]["egress"]
    rules[:] = [rule for rule in rules if "to" not in rule]


def other_port(items: list[Object]) -> None:
    find(items, "NetworkPolicy", "llm-d-epp")["spec"]["egress"][0]["ports"] = [{"port": 8000, "endPort": 8010}]


def open_by_default(items: list[Object]) -> None:
    for item in items:
        if item["kind"] == "NetworkPolicy" and item["metadata"]["namespace"] == "llm-d":
            item["spec"]["podSelector"] = {"matchLabels": {"some": "label"}}


def misspelt_service(items: list[Object]) -> None:
    find(items, "Service", "tempo")["spec"]["selector"] = {"app.kubernetes.io/name": "temp"}


def lost_file(items: list[Object]) -> None:
    del find(items, "ConfigMap", "collector-gateway")["data"]["gateway.yaml"]


def misspelt_field(items: list[Object]) -> None:
    pod(items, "Deployment", "grafana")["containers"][0]["readynessProbe"] = {}


def misspelt_custom_field(items: list[Object]) -> None:
    find(items, "InferencePool", "llm-d")["spec"]["endpointPickerRef"]["failuremode"] = "FailOpen"


def nine_ports(items: list[Object]) -> None:
    find(items, "InferencePool", "llm-d")["spec"]["targetPorts"] = [{"number": 8000 + i} for i in range(9)]


BROKEN: dict[str, tuple[Callable[[list[Object]], None], str]] = {
    "no security context": (drop("StatefulSet", "tempo", "securityContext"), "privileges may escalate"),
    "capability": (
        put("StatefulSet", "tempo", ["SYS_ADMIN"], "securityContext", "capabilities", "add"),
        "StatefulSet/llmtrace/tempo needs Pod Security privileged, and its namespace enforces restricted",
    ),
    "root": (
        put("Deployment", "model-server-decode", 0, "securityContext", "runAsUser"),
        "Deployment/llm-d/model-server-decode needs Pod Security baseline",
    ),
    "privileged": (put("Deployment", "grafana", True, "securityContext", "privileged"), "privileged is not allowed"),
    "writable": (
        put("Deployment", "grafana", False, "securityContext", "readOnlyRootFilesystem"),
        "its root file system is writable",
    ),
    "host path": (host_path, "DaemonSet/llmtrace/collector-agent needs Pod Security privileged"),
    "host network": (host_network, "hostNetwork is not allowed"),
    "no seccomp": (seccomp, "StatefulSet/llmtrace/tempo needs Pod Security baseline"),
    "no limit": (drop("StatefulSet", "prometheus", "resources", "limits"), "it has no limits.memory"),
    "no request": (drop("StatefulSet", "prometheus", "resources", "requests", "cpu"), "it has no requests.cpu"),
    "no liveness": (drop("Deployment", "llm-d-epp", "livenessProbe"), "it has no livenessProbe"),
    "no readiness": (drop("Deployment", "model-server-prefill", "readinessProbe"), "it has no readinessProbe"),
    "no tag": (
        put("StatefulSet", "tempo", "docker.io/grafana/tempo", "image"),
        "neither an exact version nor a digest",
    ),
    "latest": (put("StatefulSet", "tempo", "docker.io/grafana/tempo:latest", "image"), "neither an exact version"),
    "no registry": (put("StatefulSet", "tempo", "grafana/tempo:2.8.1", "image"), "neither an exact version"),
    "wildcard": (wildcard, "it allows everything of a kind"),
    "secrets": (secrets, "it allows secrets to be read"),
    "writes": (writes, "it allows more than to look, and not at named objects only: get, delete"),
    "no account": (remove("ServiceAccount", "grafana"), "there is no account grafana"),
    "no budget": (remove("PodDisruptionBudget", "tempo"), "StatefulSet/llmtrace/tempo has no PodDisruptionBudget"),
    "no role": (remove("Role", "prometheus"), "binds a role that is not there"),
    "no config": (remove("ConfigMap", "tempo"), "there is no ConfigMap tempo"),
    "no file": (lost_file, "there is no file /etc/otelcol/gateway.yaml"),
    "no plugin": (remove("ConfigMap", "llmtrace-plugin"), "there is no ConfigMap llmtrace-plugin"),
    "no service": (remove("Service", "tempo"), "there is no Service tempo in llmtrace"),
    "selects nothing": (misspelt_service, "Service/llmtrace/tempo selects no pods"),
    "probe's port": (
        put("Deployment", "grafana", "web", "readinessProbe", "httpGet", "port"),
        "its readinessProbe asks a port web that it does not have",
    ),
    "no namespace": (remove("Namespace", "llm-d"), "there is no namespace llm-d"),
    "door closed": (no_door, "collector-gateway may send to tempo:4318, which does not take it"),
    "way out closed": (no_way_out, "takes * from model-server-prefill, which may not send it"),
    "wider at one end": (other_port, "llm-d-epp may send to model-server-decode:8000-8010, which does not take it"),
    "open by default": (open_by_default, "Namespace/llm-d has no NetworkPolicy that denies by default"),
    "misspelt": (misspelt_field, "readynessProbe"),
    "misspelt in a custom resource": (misspelt_custom_field, "failuremode"),
    "against a custom resource's limits": (nine_ports, "InferencePool/llm-d/llm-d: spec.targetPorts"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found(case: str) -> None:
    breaks, sentence = BROKEN[case]
    items = rendered(PD)
    breaks(items)
    found = list(violations(items))
    assert any(sentence in one for one in found), found


def test_the_flows_of_prefill_and_decode() -> None:
    """The whole table: who talks to whom."""
    decode, prefill, epp = "model-server-decode", "model-server-prefill", "llm-d-epp"
    agent, gateway, way_in = "collector-agent", "collector-gateway", "inference-gateway"
    senders = (decode, prefill, epp, way_in)
    expected = {
        *(Flow(sender, agent, port) for sender in senders for port in ("4317", "4318")),
        Flow(agent, gateway, "4317"),
        Flow(gateway, "tempo", "4318"),
        *(Flow(one, "prometheus", "9090") for one in (agent, gateway, "grafana")),
        *(Flow("prometheus", one, "8888") for one in (agent, gateway)),
        Flow("prometheus", "tempo", "3200"),
        Flow("prometheus", "grafana", "3000"),
        Flow("grafana", "tempo", "3200"),
        Flow(way_in, epp, "9002"),
        Flow(agent, epp, "9090"),
        *(Flow(one, server, "8000-8007") for one in (way_in, epp) for server in (decode, prefill)),
        *(Flow(agent, server, "8000") for server in (decode, prefill)),
        *(Flow(one, other, "*") for one in (decode, prefill) for other in (decode, prefill)),
    }
    assert flows.both_ways(rendered(PD)) == expected


def test_a_selector_selects_by_all_that_it_says() -> None:
    labels = {"a": "1", "b": "2"}
    assert matches({}, labels)
    assert matches({"matchLabels": {"a": "1"}}, labels)
    assert not matches({"matchLabels": {"a": "1", "b": "1"}}, labels)
    assert matches({"matchExpressions": [{"key": "b", "operator": "In", "values": ["1", "2"]}]}, labels)
    assert not matches({"matchExpressions": [{"key": "c", "operator": "In", "values": ["1"]}]}, labels)
    with pytest.raises(UserError, match="NotIn"):
        matches({"matchExpressions": [{"key": "c", "operator": "NotIn", "values": ["1"]}]}, labels)


def test_pods_are_restricted_wherever_their_work_allows() -> None:
    for overlay in OVERLAYS:
        for item in rendered(overlay):
            if item["kind"] == "Namespace":
                expected = "privileged" if overlay == WIDE_EP and item["metadata"]["name"] == "llm-d" else "restricted"
                assert item["metadata"]["labels"][security.ENFORCE] == expected


def test_keda_owns_the_number_of_replicas_and_may_ask_prometheus() -> None:
    items = rendered(AUTOSCALING)
    scaled = find(items, "ScaledObject", "model-server")["spec"]
    target = find(items, scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"])
    assert "replicas" not in target["spec"]
    port = find(items, "Service", "prometheus")["spec"]["ports"][0]["port"]
    for trigger in scaled["triggers"]:
        assert trigger["metadata"]["serverAddress"] == f"http://prometheus.llmtrace:{port}"
        assert trigger["metadata"]["ignoreNullValues"] == "false"
    assert find(items, "NetworkPolicy", "prometheus-keda")["spec"]["ingress"][0]["ports"] == [{"port": port}]


def test_the_operators_prometheus_is_the_one_of_the_images() -> None:
    plain = pod(rendered("observability"), "StatefulSet", "prometheus")["containers"][0]["image"]
    assert plain.endswith(
        ":" + find(rendered(PD, "prometheus-operator"), "Prometheus", "prometheus")["spec"]["version"]
    )
