"""Requests through the cluster: traced from Envoy to vLLM, with pod, node and namespace on their spans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import workload
from clusters import Cluster, Played
from machines import run

pytestmark = pytest.mark.timeout(1500, func_only=True)

GPU = "nvidia.com/gpu"
SERVERS = "app.kubernetes.io/name=model-server"


@dataclass(frozen=True)
class Observed:
    """The cluster with the Collector, Prometheus and a store; ``scratch`` is for the folders that are applied."""

    cluster: Cluster
    scratch: Path
    folder: Path
    store: str
    prometheus: str
    collector: str

    def bring(self, scenario: str, servers: Path) -> Played:
        """Apply a scenario's servers, then its gateway, which must know their addresses, and verify it, by site.yml."""
        first = apply(self.cluster, [self.folder, servers])
        assert first.code == 0, first.text
        found = [
            workload.Endpoint(
                pod["metadata"]["name"],
                pod["status"]["podIP"],
                pod["metadata"]["labels"].get("llm-d.ai/role", "both"),
            )
            for pod in self.cluster.get("pods", "--namespace=llm-d", f"--selector={SERVERS}")
            if "deletionTimestamp" not in pod["metadata"]
        ]
        folder = self.scratch / f"gateway-{scenario}"
        gateway = workload.gateway(folder, self.scratch / "state", scenario, found)
        stack = {
            "scenario": scenario,
            "model": workload.MODEL_NAME,
            "gateways": {
                arm: f"http://{workload.GATEWAY_ADDRESS}:{port}" for arm, port in workload.ports(scenario).items()
            },
            "collector_otlp_grpc": f"http://{self.collector}:4317",
            "store": self.store,
            "servers": [{"name": each.name, "url": f"http://{each.address}:8000", "role": each.role} for each in found],
            "kv_block_size": workload.KV_BLOCK_SIZE,
            "pickers": {arm: {"config": str(folder / workload.picker_file(arm))} for arm in workload.ports(scenario)},
        }
        return apply(self.cluster, [self.folder, servers, gateway], cluster_verify=[stack])

    def traces(self, scenario: str, since: float) -> list[list[dict[str, Any]]]:
        """The spans of each trace of the scenario that began after ``since`` (Unix time), newest trace first."""
        query = f'q={{span.llmtrace.scenario.name="{scenario}"}}'
        times = f"start={int(since)}&end={int(time.time()) + 1}&limit=20"
        search = ["--get", "--data-urlencode", query, "--data", times, f"{self.store}/api/search"]
        answer = json.loads(self.curl(*search))
        assert answer["traces"], f"no trace of {scenario} since {since:.0f}"
        return [self.spans(scenario, found["traceID"]) for found in answer["traces"]]

    def spans(self, scenario: str, trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace, by the state file that the playbook wrote."""
        done = subprocess.run(
            self.cluster.lab.inside(Path(sys.executable).parent / "llmtrace", "trace", trace_id, "--json"),
            env={**os.environ, "LLMTRACE_STACK": str(self.cluster.kubeconfig.parent / f"stack-{scenario}.json")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        spans: list[dict[str, Any]] = json.loads(done.stdout)["spans"]
        return spans

    def curl(self, *arguments: str) -> str:
        return run(self.cluster.lab.inside("curl", "-sf", "--max-time", "20", *arguments)).stdout


@pytest.fixture(scope="module")
def observed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """What takes spans and metrics, on nodes that seem to have GPUs."""
    scratch = tmp_path_factory.mktemp("workload")
    for node in ("gpu-1", "gpu-2"):
        # What NVIDIA's device plugin would say.
        capacity = [{"op": "add", "path": f"/status/capacity/{GPU.replace('/', '~1')}", "value": "8"}]
        cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(capacity)}")
    folder = workload.observability(scratch / "observability")
    played = apply(cluster, [folder])
    assert played.code == 0, played.text
    store = f"http://{cluster.address('store', workload.STAND_INS)}:{workload.STORE_PORT}"
    prometheus = f"http://{cluster.address('prometheus', 'llmtrace')}:9090"
    return Observed(cluster, scratch, folder, store, prometheus, cluster.address("collector-agent", "llmtrace"))


@pytest.fixture(scope="module")
def unified(observed: Observed) -> Played:
    """Two model servers for whole requests, behind two pickers."""
    stop(observed.cluster, "model-server-prefill", "model-server-decode")
    return observed.bring("prefix-cache", workload.model_servers(observed.scratch / "model-servers", 2))


@pytest.fixture(scope="module")
def split(observed: Observed) -> Played:
    """A prefill and a decode server in place of the other two, behind three pickers."""
    stop(observed.cluster, "model-server")
    return observed.bring("pd-disaggregation", workload.disaggregated_servers(observed.scratch / "split-servers"))


def stop(cluster: Cluster, *deployments: str) -> None:
    cluster.kubectl("delete", "deployment", *deployments, "--namespace=llm-d", "--ignore-not-found")


def apply(cluster: Cluster, folders: list[Path], timeout_s: int = 420, **variables: object) -> Played:
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
        # The clock is one, and its cores are busy: a proxy may close its span late.
        cluster_verify_clock_tolerance_ms=100,
        **variables,
    )


def located(cluster: Cluster, spans: list[dict[str, Any]]) -> set[str]:
    """The services of a trace, each of whose spans names the pod, node and namespace that it is from."""
    pods = {
        pod["metadata"]["name"]: (pod["spec"]["nodeName"], pod["metadata"]["namespace"])
        for pod in cluster.get("pods", "--all-namespaces")
    }
    seen = set()
    for resource in (span["resource"] for span in spans):
        if resource["service.name"] == "llmtrace-client":
            continue
        assert (resource["k8s.node.name"], resource["k8s.namespace.name"]) == pods[resource["k8s.pod.name"]]
        seen.add(resource["service.name"])
    return seen


def test_prefix_cache_is_verified_through_the_cluster(unified: Played) -> None:
    assert unified.code == 0, unified.text
    assert "Verify the traces of each scenario" in unified.text
    print(f"site.yml with the gateway and the smoke test of prefix-cache in {unified.seconds:.0f} s")


def test_spans_carry_pod_node_and_namespace(observed: Observed, unified: Played) -> None:
    assert unified.code == 0
    for spans in observed.traces("prefix-cache", unified.began):
        assert located(observed.cluster, spans) == {"envoy", workload.PICKER, "vllm"}


def test_metrics_of_model_servers_arrive_in_prometheus(observed: Observed, unified: Played) -> None:
    assert unified.code == 0
    query = 'query=count(vllm:num_requests_running{role=""})'
    answer = json.loads(observed.curl("--get", "--data-urlencode", query, f"{observed.prometheus}/api/v1/query"))
    assert answer["data"]["result"][0]["value"][1] == "2"


def test_disaggregation_is_verified_through_the_cluster(split: Played) -> None:
    assert split.code == 0, split.text
    assert "Verify the traces of each scenario" in split.text
    print(f"site.yml with the gateway and the smoke test of pd-disaggregation in {split.seconds:.0f} s")


def test_a_split_request_is_followed_from_node_to_node(observed: Observed, split: Played) -> None:
    assert split.code == 0
    wanted = {"envoy", workload.PICKER, "llm-d-disagg-sidecar", "vllm"}
    legs = []
    for spans in observed.traces("pd-disaggregation", split.began):
        assert located(observed.cluster, spans) == wanted
        legs.append(
            {
                (span["resource"]["llmtrace.role"], span["resource"]["k8s.node.name"])
                for span in spans
                if span["name"] == "llm_request"
            }
        )
    assert {("prefill", "gpu-1"), ("decode", "gpu-2")} in legs
    assert {("decode", "gpu-2")} in legs


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
