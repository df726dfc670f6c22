"""The API server takes everything in manifests/: with its defaults, its rules in CEL, and Pod Security."""

from __future__ import annotations

import pytest
import yaml
from clusters import Cluster
from machines import run
from manifest_renders import AUTOSCALING, PD, rendered

from manifests.checks.definitions import SOURCES, custom_resources
from manifests.checks.render import COMPONENTS, OVERLAYS, Object

pytestmark = pytest.mark.timeout(300, func_only=True)

GATED = {"plugin-image"}
"""Needs a feature gate in this version of Kubernetes."""
CASES = [
    *((overlay, ()) for overlay in OVERLAYS),
    *((AUTOSCALING if name == "scaling-traces" else PD, (name,)) for name in COMPONENTS if name not in GATED),
]


@pytest.fixture(scope="module")
def ready(cluster: Cluster) -> Cluster:
    """The cluster with the custom resources of everybody, and nothing of ours that a new object could meet."""
    cluster.kubectl("delete", "namespace", "llm-d", "llmtrace", "--ignore-not-found", "--timeout=170s")
    definitions = [definition for source in SOURCES for definition in custom_resources(source)]
    apply(cluster, definitions)
    names = [f"customresourcedefinition/{definition['metadata']['name']}" for definition in definitions]
    cluster.kubectl("wait", *names, "--for=condition=Established", "--timeout=60s")
    apply(cluster, [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "keda"}}])
    return cluster


def apply(cluster: Cluster, items: list[Object], *arguments: str) -> str:
    """Apply ``items``; return what kubectl warns of."""
    kubectl = [cluster.bundle / "programs/kubectl", f"--kubeconfig={cluster.kubeconfig}"]
    command = [*kubectl, "apply", "--server-side", "--validate=strict", "--filename=-", *arguments]
    return run(cluster.lab.inside(*command), text=yaml.safe_dump_all(items), timeout_s=120).stderr


@pytest.mark.parametrize(("overlay", "components"), CASES, ids=["+".join([name, *more]) for name, more in CASES])
def test_it_is_taken(ready: Cluster, overlay: str, components: tuple[str, ...]) -> None:
    items = rendered(overlay, *components)
    # A dry run leaves no namespace for what comes after it.
    namespaces = [item for item in items if item["kind"] == "Namespace"]
    apply(ready, namespaces)
    warnings = apply(ready, items, "--dry-run=server")
    enforced = {item["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] for item in namespaces}
    if enforced == {"restricted"}:
        assert "would violate PodSecurity" not in warnings
