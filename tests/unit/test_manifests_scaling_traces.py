"""The component that adds the watcher of scalers: it is told what the scenario has, and may what it does."""

from __future__ import annotations

import pytest
from manifest_renders import AUTOSCALING, find, pod, rendered, variables

from llmtrace.autoscale.kubernetes import __main__ as command
from llmtrace.autoscale.kubernetes.cluster import KINDS
from llmtrace.autoscale.kubernetes.controller import Options
from manifests.checks import violations
from manifests.checks.flows import Flow, both_ways
from manifests.checks.render import Object

SCALING = "scaling-traces"


def role(items: list[Object], namespace: str) -> Object:
    (found,) = [i for i in items if i["kind"] == "Role" and "autoscale" in i["metadata"]["name"]
                and i["metadata"]["namespace"] == namespace]  # fmt: skip
    return found


@pytest.fixture
def told(tmp_path, monkeypatch) -> Options:
    """What the watcher makes of its pod's arguments."""
    items = rendered(AUTOSCALING, SCALING)
    deployment = find(items, "Deployment", "autoscale")
    own = tmp_path / "namespace"
    own.write_text(deployment["metadata"]["namespace"])
    monkeypatch.setattr(command, "SERVICE_ACCOUNT_NAMESPACE", own)
    (container,) = pod(items, "Deployment", "autoscale")["containers"]
    known = variables(container)
    arguments = [argument.replace("$(POD_NAME)", known["POD_NAME"]) for argument in container["args"]]
    found, kubeconfig = command.options(arguments)
    assert kubeconfig is None
    return found


@pytest.mark.parametrize(
    "others", [(), ("prometheus-operator",), ("several-gateways", "agent-host-queue", "cloud-gcp"), ("router-chart",)]
)
def test_it_goes_with_the_scenario_and_with_other_components(others: tuple[str, ...]) -> None:
    assert list(violations(rendered(AUTOSCALING, SCALING, *others))) == []


def test_it_talks_to_collector_and_store_and_prometheus_to_it() -> None:
    flows = {f for f in both_ways(rendered(AUTOSCALING, SCALING)) if "autoscale" in (f.source, f.target)}
    assert flows == {
        Flow("autoscale", "collector-agent", "4317"),
        Flow("autoscale", "tempo", "3200"),
        Flow("prometheus", "autoscale", "9092"),
    }


def test_it_watches_the_namespace_of_what_is_scaled(told: Options) -> None:
    scaled = find(rendered(AUTOSCALING, SCALING), "ScaledObject", "model-server")
    assert told.namespace == scaled["metadata"]["namespace"]


def test_it_may_look_at_every_kind_that_it_watches_and_at_nothing_else(told: Options) -> None:
    rules = role(rendered(AUTOSCALING, SCALING), told.namespace)["rules"]
    allowed = {(group, plural) for rule in rules for group in rule["apiGroups"] for plural in rule["resources"]}
    assert allowed == {(kind.group, kind.plural) for kind in KINDS}
    assert all(rule["verbs"] == ["list", "watch"] for rule in rules)


def test_the_objects_that_it_may_write_are_its_lease_and_its_state(told: Options) -> None:
    rules = role(rendered(AUTOSCALING, SCALING), told.home)["rules"]
    writable = [rule for rule in rules if "update" in rule["verbs"]]
    assert {rule["resources"][0] for rule in writable} == {"leases", "configmaps"}
    assert all(rule["resourceNames"] == [told.name] for rule in writable)
