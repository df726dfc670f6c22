"""Requests through the cluster: traced from Envoy to vLLM, with pod, node and namespace on their spans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import workload
from clusters import Cluster, Played
from machines import run

from llmtrace.stack import Picker, Server, Stack

pytestmark = pytest.mark.timeout(1500)

GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def stack(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything applied by site.yml and ready; the state file by which the command line finds it."""
    scratch = tmp_path_factory.mktemp("workload")
    for node in ("gpu-1", "gpu-2"):
        # What NVIDIA's device plugin would say.
        capacity = [{"op": "add", "path": f"/status/capacity/{GPU.replace('/', '~1')}", "value": "8"}]
        cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(capacity)}")
    folders = [
        workload.observability(scratch / "observability"),
        workload.model_servers(scratch / "model-servers", 2),
    ]
    first = apply(cluster, folders)
    assert first.code == 0, first.text
    servers = cluster.get("pods", "--namespace=llm-d", "--selector=app.kubernetes.io/name=model-server")
    endpoints = {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in servers}
    second = apply(cluster, [*folders, workload.gateway(scratch / "gateway", scratch / "state", endpoints)])
    assert second.code == 0, second.text
    gateway = f"http://{cluster.address('gateway', workload.STAND_INS)}"
    store = f"http://{cluster.address('store', workload.STAND_INS)}:{workload.STORE_PORT}"
    agent = f"http://{cluster.address('collector-agent', 'llmtrace')}"
    found = Stack(
        profile="cluster",
        scenario="prefix-cache",
        run_dir=scratch,
        log_dir=scratch,
        supervisor_conf=scratch / "none",
        model=workload.MODEL_NAME,
        gateways={arm: f"{gateway}:{port}" for arm, port in workload.PORTS.items()},
        servers=[Server(name=name, url=f"http://{address}:8000", process=name) for name, address in endpoints.items()],
        kv_block_size=workload.LOCAL["vllm_block_size"],
        pickers={
            arm: Picker(
                process=f"picker-{arm}",
                grpc_port=ports["grpc"],
                health_port=ports["health"],
                metrics_port=ports["metrics"],
                config=scratch / "gateway" / f"picker-{arm}.yaml",
            )
            for arm, ports in workload.LOCAL["picker_ports"]["prefix-cache"].items()
        },
        envoy_admin="http://127.0.0.1:1",
        collector_otlp_grpc=f"{agent}:4317",
        collector_otlp_http=f"{agent}:4318",
        collector_health="http://127.0.0.1:1",
        store=store,
        prometheus=f"http://{cluster.address('prometheus', 'llmtrace')}:9090",
        versions={},
    )
    found.save(scratch / "stack.json")
    return scratch / "stack.json"


def apply(cluster: Cluster, folders: list[Path], timeout_s: int = 420) -> Played:
    """Run site.yml as for a cluster that is there already: with its kubeconfig and nothing else."""
    inventory = cluster.lab.folder / "kubeconfig-only.json"
    inventory.write_text(json.dumps({"kubernetes": {"hosts": {"the-lab": {}}}}))
    return cluster.play(
        "site.yml",
        inventory=inventory,
        cluster_kubeconfig=str(cluster.kubeconfig),
        cluster_kubectl=str(cluster.bundle / "programs/kubectl"),
        cluster_manifests=list(map(str, folders)),
        cluster_manifests_timeout_s=timeout_s,
    )


def llmtrace(cluster: Cluster, stack: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in the lab's network, which has a way to pods and services by a node."""
    return subprocess.run(
        cluster.lab.inside(Path(sys.executable).parent / "llmtrace", *arguments),
        env={**os.environ, "LLMTRACE_STACK": str(stack), "OTEL_EXPORTER_OTLP_INSECURE": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_prefix_cache_is_verified_through_the_cluster(cluster: Cluster, stack: Path) -> None:
    done = llmtrace(cluster, stack, "verify", "prefix-cache", "--timeout=60", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    verified = json.loads(done.stdout)
    assert verified["ok"]
    assert len(verified["traces"]) > 1


def test_spans_carry_pod_node_and_namespace(cluster: Cluster, stack: Path) -> None:
    store = Stack.load(stack).store
    answer = run(cluster.lab.inside("curl", "-sf", "--max-time", "20", f"{store}/api/search?limit=1")).stdout
    (trace,) = json.loads(answer)["traces"]
    done = llmtrace(cluster, stack, "trace", trace["traceID"], "--json")
    assert done.returncode == 0, done.stderr
    nodes = {
        pod["metadata"]["name"]: (pod["spec"]["nodeName"], pod["metadata"]["namespace"])
        for pod in cluster.get("pods", "--all-namespaces")
    }
    seen = set()
    for span in json.loads(done.stdout)["spans"]:
        resource = span["resource"]
        if resource["service.name"] == "llmtrace-client":
            continue
        pod = resource["k8s.pod.name"]
        assert (resource["k8s.node.name"], resource["k8s.namespace.name"]) == nodes[pod]
        seen.add(resource["service.name"])
    assert {"envoy", workload.PICKER, "vllm"} <= seen


def test_metrics_of_model_servers_arrive_in_prometheus(cluster: Cluster, stack: Path) -> None:
    prometheus = Stack.load(stack).prometheus
    query = f"{prometheus}/api/v1/query?query=count(vllm:num_requests_running)"
    answer = json.loads(run(cluster.lab.inside("curl", "-sf", "--max-time", "20", query)).stdout)
    assert answer["data"]["result"][0]["value"][1] == "2"


def test_what_never_gets_ready_is_named_with_its_reason(cluster: Cluster, tmp_path: Path) -> None:
    broken = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "broken", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "broken"}},
            "template": {
                "metadata": {"labels": {"app": "broken"}},
                "spec": {
                    "containers": [{"name": "it", "image": "llmtrace.test/nowhere:1", "imagePullPolicy": "Never"}]
                },
            },
        },
    }
    folder = workload.write(tmp_path / "broken", {}, [broken])
    played = apply(cluster, [folder], timeout_s=20)
    assert played.code != 0
    assert "Deployment default/broken has 0 of 1 pods ready (broken-" in played.words
    assert 'Container image "llmtrace.test/nowhere:1" is not present' in played.words
    cluster.kubectl("delete", "deployment", "broken")
