"""The real Collector in one of its renderings, between a test and a backend that records and can go down."""

from __future__ import annotations

import gzip
import http.server
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml
from deployed import program
from loopback import free_ports, until
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from llmtrace.deploy import playbook
from llmtrace.traces.otlp import key_values

FOLDER = playbook.CHECKOUT / "collector"
RENDERINGS = {
    "local": ("common", "redaction", "span-metrics", "prometheus", "store", "local"),
    "agent": ("common", "redaction", "prometheus", "agent", "to-gateway"),
    "agent of several gateways": ("common", "redaction", "prometheus", "agent", "to-gateways"),
    "agent in Kubernetes": ("common", "redaction", "prometheus", "agent", "to-gateway", "agent-kubernetes"),
    "gateway": ("common", "redaction", "span-metrics", "prometheus", "store", "gateway"),
}
"""The lists of docs/collector.md."""
FLAGS = ("--feature-gates=ottl.set.allowNil",)
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 20


def read(name: str) -> Any:
    """A fragment, as YAML has it."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def documented(words: str) -> str:
    """The file with these words in it that docs/collector.md gives."""
    page = (FOLDER.parent / "docs" / "collector.md").read_text()
    (found,) = (text for text in re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if words in text)
    return str(found)


class Backend(TraceServiceServicer):
    """Takes traces by OTLP over HTTP and gRPC and metrics by HTTP; keeps what came, as it came.

    With another ``http_status`` than 200 it keeps nothing of HTTP, counts traces as ``refused`` and answers that. gRPC
    is at ``grpc_host``.
    """

    def __init__(self, grpc_host: str = "127.0.0.1") -> None:
        self.grpc_host = grpc_host
        self.traces: list[bytes] = []
        self.metrics: list[bytes] = []
        self.http_status = 200
        self.refused = 0
        self.http_port, self.grpc_port = free_ports(2)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start(self) -> None:
        backend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if backend.http_status == httpx.codes.OK:
                    (backend.traces if self.path == "/v1/traces" else backend.metrics).append(body)
                else:
                    backend.refused += self.path == "/v1/traces"
                self.send_response(backend.http_status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self.http_port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(self, self._grpc)  # type: ignore[no-untyped-call]
        assert self._grpc.add_insecure_port(f"{self.grpc_host}:{self.grpc_port}") == self.grpc_port
        self._grpc.start()

    def stop(self) -> None:
        """Refuse connections until ``start``; what came is kept."""
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None).wait()

    def Export(self, request: ExportTraceServiceRequest, _: Any) -> ExportTraceServiceResponse:
        self.traces.append(request.SerializeToString())
        return ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        return [
            span
            for body in list(self.traces)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def span_ids(self) -> list[bytes]:
        return [span.span_id for span in self.spans()]

    def metric_requests(self) -> list[ExportMetricsServiceRequest]:
        return [ExportMetricsServiceRequest.FromString(body) for body in list(self.metrics)]


class Collector:
    """A Collector's process, its ports and its folder, which stay the same when it is started again."""

    def __init__(
        self,
        rendering: Sequence[str],
        folder: Path,
        backend: Backend,
        variables: Mapping[str, str] | None = None,
        more: str = "",
    ) -> None:
        self.grpc_port, self.http_port, self.health_port, self.metrics_port = free_ports(4)
        self.log_path = folder / "collector.log"
        configs = [FOLDER / f"{name}.yaml" for name in rendering]
        if more:
            configs.append(folder / "more.yaml")
            configs[-1].write_text(more)
        self.command = [str(program("collector/*/otelcol")), *FLAGS, *(f"--config={path}" for path in configs)]
        self.environment = os.environ | environment(self, folder, backend) | dict(variables or {})
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._healthy():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.health_port}/", trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """By SIGTERM."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(STOP_TIMEOUT_S)
            self.process = None

    def kill(self) -> None:
        """By SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        self.process = None

    def send(self, request: ExportTraceServiceRequest, client: httpx.Client | None = None) -> bool:
        """Whether the Collector acknowledged the spans."""
        headers = {"content-type": "application/x-protobuf"}
        post = client.post if client is not None else httpx.post
        try:
            answer = post(f"{self.url}/v1/traces", content=request.SerializeToString(), headers=headers)
        except httpx.HTTPError:
            return False
        if answer.status_code != httpx.codes.OK:
            return False
        response = ExportTraceServiceResponse.FromString(answer.content)
        return response.partial_success.rejected_spans == 0

    def page(self) -> str:
        """The Collector's own metrics."""
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", trust_env=False).raise_for_status().text

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def environment(collector: Collector, folder: Path, backend: Backend) -> dict[str, str]:
    """What every rendering reads."""
    return {
        "OTLP_GRPC_ENDPOINT": f"127.0.0.1:{collector.grpc_port}",
        "OTLP_HTTP_ENDPOINT": f"127.0.0.1:{collector.http_port}",
        "HEALTH_ENDPOINT": f"127.0.0.1:{collector.health_port}",
        "METRICS_PORT": str(collector.metrics_port),
        "QUEUE_DIR": str(folder / "queue"),
        "STORE_URL": backend.url,
        "PROMETHEUS_URL": backend.url,
        "GATEWAY_ENDPOINT": f"127.0.0.1:{backend.grpc_port}",
        "RETRY_MAX_INTERVAL": "1s",
        "SPAN_METRICS_INTERVAL": "200ms",
        "DECISION_WAIT": "2s",
        "DECISION_WAIT_AFTER_ROOT": "1s",
        "K8S_NODE_NAME": "node-1",
        "PICKER_TOKEN_FILE": "/dev/null",
        "GATEWAY_SERVICE": "gateway.observability",
    }


@contextmanager
def backend(grpc_host: str = "127.0.0.1") -> Iterator[Backend]:
    found = Backend(grpc_host)
    try:
        yield found
    finally:
        found.stop()


@contextmanager
def collecting(
    name: str,
    folder: Path,
    backend: Backend,
    variables: Mapping[str, str] | None = None,
    more: str = "",
    *,
    capture: bool = False,
) -> Iterator[Collector]:
    """A Collector that runs in the rendering ``name``; with ``capture``, texts pass it."""
    rendering = (*RENDERINGS[name], *(("capture-content",) if capture else ()))
    collector = Collector(rendering, folder, backend, variables, more)
    collector.start()
    try:
        yield collector
    finally:
        collector.stop()


def spans_of(
    *spans: Mapping[str, Any], resource: Mapping[str, Any] | None = None, scope: str = "test"
) -> ExportTraceServiceRequest:
    """A request of spans: ``attributes`` plain, ``trace`` and ``span`` bytes (random without), the rest as in OTLP."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.extend(key_values({"service.name": "test"} | dict(resource or {})))
    scoped = group.scope_spans.add()
    scoped.scope.name = scope
    now = time.time_ns()
    for given in spans:
        fields = dict(given)
        plain = fields.pop("attributes", {})
        start = fields.pop("start", now)
        span = scoped.spans.add(
            trace_id=fields.pop("trace", None) or os.urandom(16),
            span_id=fields.pop("span", None) or os.urandom(8),
            start_time_unix_nano=start,
            end_time_unix_nano=start + int(fields.pop("seconds", 0.001) * 1e9),
            **{"name": "work", "kind": Span.SPAN_KIND_INTERNAL, **fields},
        )
        span.attributes.extend(key_values(plain))
    return request


def wait_for(backend: Backend, trace_ids: set[bytes], timeout_s: float = 20) -> None:
    until(lambda: trace_ids <= {s.trace_id for s in backend.spans()}, f"{len(trace_ids)} traces", timeout_s, poll_s=0.1)
