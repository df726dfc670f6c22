"""Measures what the picker adds to a request: Envoy with picker, scorers and spans against Envoy's plain round robin.

``python -m bench.gateway [--seconds N] [--json]``. Both ways lead through the kit's own Envoy configuration to the
same trivial backends (Envoy's direct responses), in alternating rounds of one run, with prompts of 4 kB. Spans are
sent to a sink that counts and drops them. Needs the Envoy that ``make up`` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import uvloop
import yaml

from bench.processes import free_ports, process, wait
from bench.sink import sink
from llmtrace.stack import cache_home

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "playbooks/roles/envoy/templates/envoy.yaml.j2"
ENVOY = cache_home() / "envoy/1.40.0/envoy/_bin/envoy"
API = "type.googleapis.com/envoy.extensions"
BACKENDS = 3
PROMPT_BYTES = 4096
ROUNDS = 4
START_TIMEOUT_S = 30
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "bench",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 900, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 896}},
}
METRICS = "vllm:num_requests_waiting 0\nvllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.1\n"
PICKER_CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - {{type: file-discovery, parameters: {{path: {endpoints}}}}}
  - {{type: approx-prefix-cache-producer, parameters: {{autoTune: false, blockSizeTokens: 64}}}}
  - {{type: prefix-cache-scorer}}
  - {{type: queue-scorer}}
  - {{type: kv-cache-utilization-scorer}}
  - {{type: max-score-picker}}
schedulingProfiles:
  - name: default
    plugins:
      - {{pluginRef: prefix-cache-scorer, weight: 2}}
      - {{pluginRef: queue-scorer, weight: 1}}
      - {{pluginRef: kv-cache-utilization-scorer, weight: 1}}
      - {{pluginRef: max-score-picker}}
dataLayer: {{discovery: {{pluginRef: file-discovery}}}}
"""


def hcm(prefix: str, routes: list[dict[str, Any]], port: int) -> dict[str, Any]:
    """A listener of Envoy with these routes."""
    router = {"@type": f"{API}.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{API}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": prefix,
        "route_config": {"name": prefix, "virtual_hosts": [{"name": prefix, "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    return {
        "name": prefix,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def envoy_config(ports: dict[str, Any]) -> dict[str, Any]:
    """The kit's configuration with one gateway, and beside it the plain way and the backends."""
    config: dict[str, Any] = yaml.safe_load(
        jinja2.Template(TEMPLATE.read_text()).render(
            envoy_admin_port=ports["admin"],
            scenario="bench",
            gateway_ports={"bench": {"picker": ports["picker_gateway"]}},
            picker_ports={"bench": {"picker": {"grpc": ports["picker"]}}},
            collector_otlp_grpc_port=ports["sink"],
            picker_binary="",
            tracing_off=[],
        )
    )
    listeners = config["static_resources"]["listeners"]
    for listener in listeners:
        for chain in listener["filter_chains"]:
            chain["filters"][0]["typed_config"].pop("access_log", None)
    listeners.append(hcm("plain", [{"match": {"prefix": "/"}, "route": {"cluster": "plain"}}], ports["plain_gateway"]))
    for index, port in enumerate(ports["backends"]):
        listeners.append(hcm(f"backend-{index}", [direct("/metrics", METRICS), direct("/", json.dumps(ANSWER))], port))
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
        for port in ports["backends"]
    ]
    config["static_resources"]["clusters"].append(
        {
            "name": "plain",
            "type": "STATIC",
            "lb_policy": "ROUND_ROBIN",
            "load_assignment": {"cluster_name": "plain", "endpoints": [{"lb_endpoints": endpoints}]},
        }
    )
    return config


def direct(prefix: str, body: str) -> dict[str, Any]:
    header = {"header": {"key": "content-type", "value": "application/json"}}
    return {
        "match": {"prefix": prefix},
        "direct_response": {"status": 200, "body": {"inline_string": body}},
        "response_headers_to_add": [header],
    }


@contextmanager
def gateway(folder: Path, *, tracing: bool = True) -> Iterator[dict[str, Any]]:
    """Envoy, backends, picker and sink; yields the ports."""
    names = ("admin", "picker_gateway", "plain_gateway", "picker", "health", "metrics")
    found = free_ports(len(names) + BACKENDS)
    ports: dict[str, Any] = {**dict(zip(names, found, strict=False)), "backends": found[len(names) :]}
    entries = [{"name": f"b{i}", "address": "127.0.0.1", "port": str(p)} for i, p in enumerate(ports["backends"])]
    (folder / "endpoints.yaml").write_text(yaml.safe_dump({"endpoints": entries}))
    (folder / "picker.yaml").write_text(PICKER_CONFIG.format(endpoints=folder / "endpoints.yaml"))
    command = [sys.executable, "-m", "llmtrace.picker", "--pool-name=bench", f"--config-file={folder / 'picker.yaml'}"]
    command += [f"--grpc-port={ports['picker']}", f"--grpc-health-port={ports['health']}"]
    command += [f"--metrics-port={ports['metrics']}"]
    envoy = [str(ENVOY), "-c", str(folder / "envoy.yaml"), "--concurrency", "1", "--log-level", "warn"]
    with sink() as [receiver]:
        ports["sink"] = receiver.port
        endpoint = f"http://127.0.0.1:{receiver.port}"
        tracer = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if tracing else {"OTEL_SDK_DISABLED": "true"}
        (folder / "envoy.yaml").write_text(yaml.safe_dump(envoy_config(ports)))
        with process([*envoy, "--base-id", str(ports["admin"])], folder / "envoy.log", {}):
            wait(f"http://127.0.0.1:{ports['admin']}/ready", folder / "envoy.log", START_TIMEOUT_S)
            with process(command, folder / "picker.log", tracer):
                wait(f"http://127.0.0.1:{ports['metrics']}/metrics", folder / "picker.log", START_TIMEOUT_S)
                yield ports


class Client(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the answer to the last is complete."""

    def __init__(self, requests: list[bytes], deadline: float) -> None:
        self.latencies: list[float] = []
        self.failures = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._deadline = deadline
        self._received = b""
        self._index = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        if self._sent >= self._deadline:
            self._transport.close()
            return
        self._transport.write(self._requests[self._index % len(self._requests)])  # type: ignore[attr-defined]
        self._index += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not self._complete(head.lower(), body):
            return
        self.latencies.append(time.perf_counter() - self._sent)
        self.failures += not head.startswith(b"HTTP/1.1 200")
        self._received = b""
        self._send()

    @staticmethod
    def _complete(head: bytes, body: bytes) -> bool:
        if b"transfer-encoding: chunked" in head:
            return body.endswith(b"0\r\n\r\n")
        return len(body) >= int(head.split(b"content-length:")[1].split(b"\r\n")[0])

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)


async def load(port: int, connections: int, seconds: float) -> dict[str, float]:
    requests = [request(f"tenant {number} " * (PROMPT_BYTES // 10), number) for number in range(50)]
    deadline = time.perf_counter() + seconds
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(requests, deadline), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(client.done for client in clients))
    latencies = sorted(latency for client in clients for latency in client.latencies)
    return {
        "p50_ms": statistics.median(latencies) * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "requests_per_s": len(latencies) / seconds,
        "failures": sum(client.failures for client in clients),
    }


def request(prompt: str, number: int) -> bytes:
    content = f"{prompt[:PROMPT_BYTES]} question {number}"
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": content}]}).encode()
    trace = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"traceparent: {trace}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def measure(seconds: float, *, tracing: bool = True) -> dict[str, Any]:
    """Medians over the rounds, for one and eight connections."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder), tracing=tracing) as ports:
        uvloop.run(load(ports["picker_gateway"], 4, 1))
        for connections in (1, 8):
            rounds: dict[str, list[dict[str, float]]] = {"plain": [], "picker": []}
            for _ in range(ROUNDS):
                for way, found in rounds.items():
                    found.append(uvloop.run(load(ports[f"{way}_gateway"], connections, seconds / ROUNDS)))
            results[f"{connections} connections"] = {
                way: {key: statistics.median(each[key] for each in found) for key in found[0]}
                for way, found in rounds.items()
            }
    return results


def report(results: dict[str, Any]) -> str:
    lines = []
    for connections, ways in results.items():
        plain, picker = ways["plain"], ways["picker"]
        lines.append(connections)
        for way, found in ways.items():
            lines.append(
                f"  {way:7} p50 {found['p50_ms']:.2f} ms   p99 {found['p99_ms']:.2f} ms   "
                f"{found['requests_per_s']:,.0f} requests/s   {found['failures']:.0f} failures"
            )
        lines.append(
            f"  added   p50 {picker['p50_ms'] - plain['p50_ms']:.2f} ms   "
            f"p99 {picker['p99_ms'] - plain['p99_ms']:.2f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="load for each way and number of connections")
    parser.add_argument("--no-tracing", action="store_true", help="switch the picker's tracing off")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.seconds, tracing=not arguments.no_tracing)
    print(json.dumps(results, indent=2) if arguments.json else report(results))


if __name__ == "__main__":
    main()
