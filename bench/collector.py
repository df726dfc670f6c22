"""Measures the gateway Collector: spans per second and core, against the same Collector with only OTLP in and out.

``python -m bench.collector [--seconds N] [--rounds N] [--json]``. Both Collectors run at the same time and take turns:
while one is loaded as much as it takes, the other idles. A span costs what the process used of the processor, so that
the load generator on the same cores does not count. The gateway has its defaults (all metrics of spans, redaction, tail
sampling, the queue on disk), a memory limit of 1 GiB, and sends to the same kind of sink as the other. Every request
has new trace ids. Then a third, a gateway with half of that limit, is loaded until it refuses, and for a turn more:
what it uses then is the memory at saturation. Needs the Collector that ``llmtrace up`` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.processes import free_ports, process, wait
from bench.sink import Receiver, sink
from llmtrace.stack import cache_home
from llmtrace.traces.otlp import key_values

FOLDER = Path(__file__).parents[1] / "collector"
GATEWAY = ("common", "redaction", "span-metrics", "prometheus", "store", "gateway")
AMPLE = {"MEMORY_LIMIT_MIB": "1024", "MEMORY_SPIKE_MIB": "200"}
SMALL = {"MEMORY_LIMIT_MIB": "500", "MEMORY_SPIKE_MIB": "100", "GOMEMLIMIT": "500MiB"}
"""In proportion as in manifests/base/collector."""
SATURATED_S = 120
"""Within which a gateway with a small memory limit has to refuse."""
SENDERS = 4
TRACES = 25
"""In a request; each with one span of every one of ``NAMES``."""
NAMES = (
    *(("llmtrace-client", "chat m"), ("envoy", "ingress"), ("envoy", "router model-servers egress")),
    *(("llm-d-epp", name) for name in ("gateway.request", "gateway.request_orchestration", "run_scheduler_profile")),
    *(
        ("llm-d-epp", name)
        for name in ("filter_endpoints", "llm_d.epp.scoring", "pick_endpoints", "prepare_disaggregation")
    ),
    *(("llm-d-epp", f"llm_d.epp.scorer.{name}-scorer") for name in ("prefix-cache", "queue", "kv-cache-utilization")),
    *(("llm-d-disagg-sidecar", name) for name in ("forward_request", "prefill", "decode")),
    *(("vllm", name) for name in ("llm_request", "queue", "prefill", "decode")),
)
PLAIN = """
receivers:
  otlp: {protocols: {grpc: {endpoint: "${env:OTLP_GRPC_ENDPOINT}"}, http: {endpoint: "${env:OTLP_HTTP_ENDPOINT}"}}}
exporters:
  otlp_grpc/sink: {endpoint: "${env:SINK}", tls: {insecure: true}}
extensions:
  health_check: {endpoint: "${env:HEALTH_ENDPOINT}"}
service:
  extensions: [health_check]
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [otlp_grpc/sink]}
"""
TO_SINK = """
exporters:
  otlp_grpc/sink:
    endpoint: ${env:SINK}
    tls: {insecure: true}
    sending_queue:
      {storage: file_storage/queue, sizer: bytes, queue_size: 536870912, block_on_overflow: true,
       batch: {sizer: items, flush_timeout: 500ms, min_size: 2048, max_size: 4096}}
  debug: {verbosity: basic}
service:
  pipelines:
    traces: {exporters: [otlp_grpc/sink]}
    metrics: {exporters: [debug]}
    metrics/spans: {exporters: [debug]}
"""


@dataclass
class Running:
    """A Collector, and what it was seen to do."""

    url: str
    process: psutil.Process
    receiver: Receiver
    spans: int = 0
    refused: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    largest: int = 0

    @property
    def cpu(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def running(config: list[Path], folder: Path, receiver: Receiver, memory: dict[str, str] = AMPLE) -> Iterator[Running]:
    grpc_port, http_port, health, metrics = free_ports(4)
    found = [path for path in cache_home().glob("collector/*/otelcol") if ".partial" not in str(path)]
    if not found:
        raise SystemExit(f"there is no Collector in {cache_home()}: run `llmtrace up` first")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    command = [str(newest), "--feature-gates=ottl.set.allowNil", *(f"--config={path}" for path in config)]
    environment = {
        "OTLP_GRPC_ENDPOINT": f"127.0.0.1:{grpc_port}",
        "OTLP_HTTP_ENDPOINT": f"127.0.0.1:{http_port}",
        "HEALTH_ENDPOINT": f"127.0.0.1:{health}",
        "METRICS_PORT": str(metrics),
        "QUEUE_DIR": str(folder / "queue"),
        "STORE_URL": "http://127.0.0.1:9",
        "PROMETHEUS_URL": "http://127.0.0.1:9",
        "SINK": f"127.0.0.1:{receiver.port}",
    } | memory
    log = folder / "collector.log"
    with process(command, log, environment) as child:
        wait(f"http://127.0.0.1:{health}/", log, 30, child)
        yield Running(f"http://127.0.0.1:{http_port}/v1/traces", psutil.Process(child.pid), receiver)


class Requests:
    """Requests of whole traces; only ids differ, and these are put into the finished bytes."""

    def __init__(self) -> None:
        self._marks = [f"trace-{index:010}".encode() for index in range(TRACES)]
        message = ExportTraceServiceRequest()
        scopes = {}
        for service in dict(NAMES):
            group = message.resource_spans.add()
            group.resource.attributes.extend(
                key_values({"service.name": service, "service.instance.id": f"{service}-0", "host.name": "node"})
            )
            scopes[service] = group.scope_spans.add()
            scopes[service].scope.name = "bench"
        now = time.time_ns()
        for mark in self._marks:
            parent = b""
            for index, (service, name) in enumerate(NAMES):
                span = scopes[service].spans.add(
                    trace_id=mark, span_id=os.urandom(8), parent_span_id=parent, name=name, kind=1 + index % 3
                )
                span.start_time_unix_nano = now + index * 10_000
                span.end_time_unix_nano = now + 900_000_000 - index * 10_000
                span.attributes.extend(key_values(self._attributes(name)))
                parent = span.span_id
        self._body = message.SerializeToString()

    @staticmethod
    def _attributes(name: str) -> dict[str, str | int | float | bool]:
        found: dict[str, str | int | float | bool] = {
            "gen_ai.request.id": "a743aed0-7268-9685-9d77-ef4dd43701ee",
            "gen_ai.request.model": "meta-llama/Llama-3.1-8B-Instruct",
            "gen_ai.usage.input_tokens": 1511,
            "gen_ai.usage.output_tokens": 128,
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "server.address": "10.0.0.7",
            "server.port": 8000,
            "llm_d.epp.scorer.score.max": 0.9123,
        }
        if name == "llm_request":
            found |= {
                "gen_ai.latency.time_to_first_token": 0.215,
                "gen_ai.latency.time_in_model_decode": 1.02,
                "gen_ai.usage.prompt_tokens": 1511,
                "gen_ai.usage.completion_tokens": 128,
                "gen_ai.usage.cache_read.input_tokens": 1280,
            }
        return found

    def next(self) -> bytes:
        body = self._body
        for mark in self._marks:
            body = body.replace(mark, os.urandom(16))
        return body


def press(target: Running, seconds: float) -> None:
    """Send as much as the Collector takes for so long."""
    requests = Requests()
    over = time.monotonic() + seconds
    lock = threading.Lock()
    each = TRACES * len(NAMES)

    def send(_: int) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while time.monotonic() < over:
                answer = client.post(
                    target.url, content=requests.next(), headers={"content-type": "application/x-protobuf"}
                )
                with lock:
                    if answer.status_code == httpx.codes.OK:
                        target.spans += each
                    else:
                        target.refused += each
                    target.largest = max(target.largest, target.process.memory_info().rss)

    start = time.monotonic()
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(send, range(SENDERS)))
    target.seconds += time.monotonic() - start


def load(target: Running, seconds: float) -> None:
    """As :func:`press`, then see how long it works on that."""
    cpu = target.cpu
    press(target, seconds)
    # What waits for its decision is decided some seconds later, and paid then.
    settled(target)
    target.cpu_seconds += target.cpu - cpu


def saturate(target: Running, seconds: float) -> None:
    """Press until the Collector refuses, go on so long, and see that it takes spans again afterwards."""
    deadline = time.monotonic() + SATURATED_S
    while not target.refused:
        if time.monotonic() > deadline:
            raise SystemExit(f"the gateway took {target.spans:,} spans in {SATURATED_S} s and refused none")
        press(target, 1)
    press(target, seconds)
    settled(target)
    spans = target.spans
    press(target, 1)
    if target.spans == spans:
        raise SystemExit("the gateway refused spans, and takes none now that it has nothing to do")


def settled(target: Running, timeout_s: float = 60) -> None:
    """Until the Collector has nothing to do any more."""
    deadline = time.monotonic() + timeout_s
    quiet = 0
    while quiet < 12 and time.monotonic() < deadline:
        before = target.cpu
        time.sleep(1)
        target.largest = max(target.largest, target.process.memory_info().rss)
        quiet = quiet + 1 if target.cpu - before < 0.1 else 0


def measure(seconds: float, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name, sink((0.0, 0.0, 0.0)) as receivers:
        folders = [Path(name) / part for part in ("plain", "gateway", "saturated")]
        for folder in folders:
            folder.mkdir()
        (folders[0] / "plain.yaml").write_text(PLAIN)
        (folders[1] / "sink.yaml").write_text(TO_SINK)
        gateway_config = [*(FOLDER / f"{part}.yaml" for part in GATEWAY), folders[1] / "sink.yaml"]
        with (
            running([folders[0] / "plain.yaml"], folders[0], receivers[0]) as plain,
            running(gateway_config, folders[1], receivers[1]) as gateway,
            running(gateway_config, folders[2], receivers[2], SMALL) as saturated,
        ):
            ratios = []
            for _ in range(rounds):
                costs = []
                for target in (plain, gateway):
                    spans, cpu = target.spans, target.cpu_seconds
                    load(target, seconds)
                    costs.append((target.cpu_seconds - cpu) / max(target.spans - spans, 1))
                ratios.append(costs[0] / costs[1])
            found: dict[str, object] = {"cores": os.cpu_count(), "spans in a trace": len(NAMES)}
            for label, target in (("plain", plain), ("gateway", gateway)):
                found |= {
                    f"{label}: spans/s per core": round(target.spans / target.cpu_seconds),
                    f"{label}: spans/s taken": round(target.spans / target.seconds),
                    f"{label}: spans refused": target.refused,
                    f"{label}: spans sent on": target.receiver.counts().spans,
                    f"{label}: most memory, MiB": round(target.largest / 2**20),
                }
            saturate(saturated, seconds)
            found |= {
                "saturated: spans taken": saturated.spans,
                "saturated: spans refused": saturated.refused,
                "saturated: most memory, MiB": round(saturated.largest / 2**20),
            }
            return found | {"gateway / plain, per core": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of load in each turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.seconds, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:,}")


if __name__ == "__main__":
    main()
