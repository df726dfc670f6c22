"""The agent with agent-kubernetes.yaml and to-gateways.yaml against a real kube-apiserver, with its account's rights.

In place of pods there are HTTP servers on loopback addresses, which the API server has as the pods' own.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from collecting import Backend, Collector, backend, collecting, spans_of
from kubernetes_plane import AGENT, Object, Plane, control_plane
from loopback import until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from llmtrace.traces import otlp

pytestmark = pytest.mark.timeout(300)
MANIFESTS = Path(__file__).parents[2] / "manifests"
RIGHTS = ("base/collector/collectorAgent-cluster*.yaml", "components/several-gateways/collectorAgent-role*.yaml")
NODE, ELSEWHERE = "node-1", "node-2"
GPU = "NVIDIA-H200"
MODEL = "qwen3-32b"
WAIT_S = 60
TOKEN = "the picker's metrics are not for everybody"
VLLM_PAGE = f"""\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 3
"""
PICKER_PAGE = """\
# TYPE llm_d_epp_ready_endpoints gauge
llm_d_epp_ready_endpoints{name="llm-d"} 2
"""
DCGM_PAGE = """\
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",modelName="NVIDIA H200"} 87
"""


@contextmanager
def page(address: str, text: str, port: int = 0, token: str = "") -> Iterator[int]:
    """Serve metrics at an address, to whom shows the token; gives the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = not token or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(200 if allowed and self.path == "/metrics" else 403)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode() if allowed else b"")

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer((address, port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Pods:
    """Makes the pods of a cluster, as the API server has them."""

    plane: Plane

    def add(self, name: str, address: str, container: Object, node: str = NODE, **labels: str) -> str:
        """A pod that runs; gives its uid."""
        pods = "/api/v1/namespaces/llm-d/pods"
        made = self.plane.call("POST", pods, {
            "metadata": {"name": name, "namespace": "llm-d", "labels": labels},
            "spec": {"nodeName": node, "containers": [{"image": "image"} | container]},
        })  # fmt: skip
        running = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "10.0.0.1"}
        told = self.plane.call("PUT", f"{pods}/{name}/status", made | {"status": made["status"] | running})
        assert told["status"]["podIP"] == address
        return str(made["metadata"]["uid"])


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A control plane with two nodes, the namespaces, and what the manifests allow the agent."""
    with control_plane(tmp_path_factory.mktemp("kubernetes")) as running:
        plane = running.plane
        for name in ("llm-d", "llmtrace"):
            plane.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        for name in (NODE, ELSEWHERE):
            labels = {"nvidia.com/gpu.product": GPU if name == NODE else "another"}
            plane.call("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
        for path in (path for pattern in RIGHTS for path in sorted(MANIFESTS.glob(pattern))):
            item = yaml.safe_load(path.read_text())
            namespace = item["metadata"].get("namespace")
            where = f"namespaces/{namespace}/" if namespace else ""
            plane.call("POST", f"/apis/rbac.authorization.k8s.io/v1/{where}{item['kind'].lower()}s", item)
        yield plane


def of_agent(plane: Plane) -> dict[str, str]:
    """The environment of an agent that runs in no pod."""
    return {"K8S_AUTH_TYPE": "kubeConfig", "KUBECONFIG": str(plane.kubeconfig(AGENT)), "K8S_NODE_NAME": NODE}


@dataclass
class Scene:
    """An agent, what is behind it, and the uids of the pods by name."""

    agent: Collector
    store: Backend
    uids: dict[str, str]


@pytest.fixture(scope="module")
def scene(plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("agent")
    (folder / "token").write_text(TOKEN)
    serving = {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": MODEL}
    with ExitStack() as stack:
        vllm = stack.enter_context(page("127.0.1.1", VLLM_PAGE))
        stack.enter_context(page("127.0.1.4", VLLM_PAGE, vllm))
        picker = stack.enter_context(page("127.0.1.2", PICKER_PAGE, token=TOKEN))
        dcgm = stack.enter_context(page("127.0.1.3", DCGM_PAGE))
        pods = Pods(plane)
        metrics = {"name": "epp", "ports": [{"name": "metrics", "containerPort": picker}]}
        uids = {
            "decode-0": pods.add("decode-0", "127.0.1.1", {"name": "vllm"}, **serving, **{"llm-d.ai/role": "decode"}),
            "epp-0": pods.add("epp-0", "127.0.1.2", metrics),
            "dcgm-0": pods.add("dcgm-0", "127.0.1.3", {"name": "exporter"}, app="nvidia-dcgm-exporter"),
            "other-node": pods.add("other-node", "127.0.1.4", {"name": "vllm"}, ELSEWHERE, **serving),
            "no-server": pods.add("no-server", "127.0.1.5", {"name": "vllm"}),
        }
        store = stack.enter_context(backend())
        variables = of_agent(plane) | {
            "SCRAPE_INTERVAL": "1s",
            "VLLM_PORT": str(vllm),
            "DCGM_PORT": str(dcgm),
            "PICKER_TOKEN_FILE": str(folder / "token"),
        }
        agent = stack.enter_context(collecting("agent in Kubernetes", folder, store, variables))
        yield Scene(agent, store, uids)


def send(agent: Collector, address: str, name: str, **resource: str) -> None:
    """One span, from a pod's address."""
    headers = {"content-type": "application/x-protobuf"}
    body = spans_of({"name": name}, resource=resource).SerializeToString()
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=10) as client:
        client.post(f"{agent.url}/v1/traces", content=body, headers=headers).raise_for_status()


def resource_of(store: Backend, name: str) -> dict[str, Any] | None:
    """The resource of the newest span of this name."""
    for body in reversed(store.traces):
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            if any(span.name == name for scope in group.scope_spans for span in scope.spans):
                return otlp.attributes(group.resource.attributes)
    return None


def sent_from(scene: Scene, address: str, name: str, **resource: str) -> dict[str, Any]:
    """What the agent made of the resource of a span, once it knows the pod."""

    def told() -> dict[str, Any] | None:
        send(scene.agent, address, name, **resource)
        found = resource_of(scene.store, name)
        return found if found and "k8s.pod.name" in found else None

    found: dict[str, Any] = until(told, "what the agent knows of the pod", WAIT_S, poll_s=0.5)
    return found


def scraped(store: Backend, metric: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Resource and labels of a gauge's points, the newest last."""
    return [
        (otlp.attributes(group.resource.attributes), otlp.attributes(point.attributes))
        for request in store.metric_requests()
        for group in request.resource_metrics
        for scope in group.scope_metrics
        for found in scope.metrics
        if found.name == metric
        for point in found.gauge.data_points
    ]


def newest(store: Backend, metric: str) -> tuple[dict[str, Any], dict[str, Any]]:
    found: list[tuple[dict[str, Any], dict[str, Any]]] = until(
        lambda: [told for told in scraped(store, metric) if "k8s.pod.name" in told[0]], metric, WAIT_S, poll_s=0.5
    )
    return found[-1]


def about(scene: Scene, name: str) -> dict[str, str]:
    """What the agent must say of a pod."""
    return {
        "k8s.namespace.name": "llm-d",
        "k8s.pod.name": name,
        "k8s.pod.uid": scene.uids[name],
        "k8s.node.name": NODE,
        "llmtrace.gpu.product": GPU,
    }


SERVER = {"llmtrace.role": "decode", "gen_ai.request.model": MODEL}


def test_a_span_tells_the_pod_that_sent_it(scene: Scene) -> None:
    found = sent_from(scene, "127.0.1.1", "of a server")
    assert about(scene, "decode-0").items() | SERVER.items() <= found.items()
    assert found["service.instance.id"] == "decode-0"
    other = sent_from(scene, "127.0.1.2", "of a picker")
    assert about(scene, "epp-0").items() <= other.items()
    assert not SERVER.keys() & other.keys()


def test_a_process_that_names_itself_keeps_its_name(scene: Scene) -> None:
    found = sent_from(scene, "127.0.1.1", "of a rank", **{"service.instance.id": "decode-0-rank-3"})
    assert found["service.instance.id"] == "decode-0-rank-3"
    assert found["k8s.pod.name"] == "decode-0"


def test_what_runs_on_the_node_is_scraped(scene: Scene) -> None:
    resource, labels = newest(scene.store, "vllm:num_requests_running")
    assert about(scene, "decode-0").items() | SERVER.items() <= resource.items()
    assert (resource["service.name"], resource["service.instance.id"]) == ("vllm", "decode-0")
    wanted = {"namespace": "llm-d", "role": "decode", "model_name": MODEL}
    assert wanted.items() <= labels.items()
    resource, labels = newest(scene.store, "llm_d_epp_ready_endpoints")
    assert about(scene, "epp-0").items() <= resource.items()
    assert (resource["service.name"], labels["namespace"]) == ("picker", "llm-d")
    resource, labels = newest(scene.store, "DCGM_FI_DEV_GPU_UTIL")
    assert (resource["service.name"], resource["service.instance.id"], labels["gpu"]) == ("dcgm", NODE, "0")
    assert resource["llmtrace.gpu.product"] == GPU
    pods = {told["k8s.pod.name"] for told, _ in scraped(scene.store, "up") if "k8s.pod.name" in told}
    assert pods == {"decode-0", "epp-0", "dcgm-0"}, "nothing of another node, and no pod that is no server"


def own_address() -> str:
    """An address of this machine that is no loopback address, which an EndpointSlice may not have; '' without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as looking:
        try:
            looking.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        found = str(looking.getsockname()[0])
    return "" if found.startswith("127.") else found


def test_spans_of_a_trace_go_to_one_of_the_gateways_that_are_there(plane: Plane, tmp_path: Path) -> None:
    address = own_address()
    if not address:
        pytest.skip("this machine has loopback addresses only")
    slices = "/apis/discovery.k8s.io/v1/namespaces/llmtrace/endpointslices"
    with backend() as store, backend(address) as one, backend(address) as two:
        gateways = (one, two)
        ports = json.dumps([gateway.grpc_port for gateway in gateways])
        more = f"exporters: {{loadbalancing/gateways: {{resolver: {{k8s: {{ports: {ports}}}}}}}}}"
        variables = of_agent(plane) | {"GATEWAY_SERVICE": "collector-gateway.llmtrace"}
        with collecting("agent of several gateways", tmp_path, store, variables, more) as agent:
            traces = [os.urandom(16) for _ in range(60)]
            # No gateway is there: the spans are in the agent's queue.
            assert all(agent.send(spans_of({"trace": trace})) for trace in traces)
            plane.call("POST", slices, {
                "metadata": {"name": "gateways", "labels": {"kubernetes.io/service-name": "collector-gateway"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
                "ports": [{"name": "otlp-grpc", "port": 4317}],
            })  # fmt: skip
            assert all(agent.send(spans_of({"trace": trace})) for trace in traces)
            until(lambda: sum(len(gateway.spans()) for gateway in gateways) == 120, "every span", WAIT_S, poll_s=0.2)
    for gateway in gateways:
        counts = Counter(span.trace_id for span in gateway.spans())
        assert counts
        assert set(counts.values()) == {2}
