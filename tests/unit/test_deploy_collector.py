"""The real Collector with the kit's configuration, between a client and a recording backend."""

from __future__ import annotations

import gzip
import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from deployed import program
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bench.processes import free_ports
from llmtrace.deploy import playbook


class Backend:
    """Records the spans that arrive at /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        backend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/traces":
                    request = ExportTraceServiceRequest.FromString(gzip.decompress(body))
                    backend.spans += [
                        span
                        for resource in request.resource_spans
                        for scope in resource.scope_spans
                        for span in scope.spans
                    ]
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for_spans(self, count: int, timeout_s: float = 20) -> list[Span]:
        deadline = time.monotonic() + timeout_s
        while len(self.spans) < count:
            assert time.monotonic() < deadline, f"{len(self.spans)} of {count} spans after {timeout_s} s"
            time.sleep(0.05)
        return self.spans


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.server.shutdown()


@pytest.fixture
def collector(backend: Backend, tmp_path: Path) -> Iterator[str]:
    grpc_port, http_port, health, metrics = free_ports(4)
    folder = playbook.CHECKOUT / "collector"
    command = [
        program("collector/*/otelcol"),
        *(f"--config={folder}/{n}.yaml" for n in ("common", "span-metrics", "local")),
    ]
    environment = os.environ | {
        "OTLP_GRPC_ENDPOINT": f"127.0.0.1:{grpc_port}",
        "OTLP_HTTP_ENDPOINT": f"127.0.0.1:{http_port}",
        "HEALTH_ENDPOINT": f"127.0.0.1:{health}",
        "METRICS_PORT": str(metrics),
        "STORE_URL": backend.url,
        "PROMETHEUS_URL": backend.url,
        "QUEUE_DIR": str(tmp_path / "queue"),
    }
    with (tmp_path / "collector.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{health}/").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, (tmp_path / "collector.log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{http_port}"
        finally:
            process.terminate()
            process.wait(20)


def attributes(**values: str) -> list[KeyValue]:
    return [KeyValue(key=key.replace("__", "."), value=AnyValue(string_value=value)) for key, value in values.items()]


def test_content_never_passes_the_collector(collector: str, backend: Backend) -> None:
    secret = attributes(
        gen_ai__prompt="SECRET",
        gen_ai__prompt__0__content="SECRET",
        gen_ai__completion="SECRET",
        gen_ai__input__messages="SECRET",
        gen_ai__output__messages="SECRET",
        gen_ai__system_instructions="SECRET",
        gen_ai__tool__call__arguments="SECRET",
        llm__prompts="SECRET",
    )
    kept = attributes(gen_ai__request__model="m", gen_ai__usage__prompt_tokens="7", gen_ai__tool__call__id="t1")
    request = ExportTraceServiceRequest()
    span = (
        request.resource_spans.add()
        .scope_spans.add()
        .spans.add(
            trace_id=b"\x01" * 16,
            span_id=b"\x02" * 8,
            name="chat m",
            start_time_unix_nano=1,
            end_time_unix_nano=2,
        )
    )
    span.attributes.extend([*secret, *kept])
    span.events.add(name="gen_ai.content.prompt").attributes.extend([*secret, *kept])
    httpx.post(
        f"{collector}/v1/traces",
        content=request.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    ).raise_for_status()

    (received,) = backend.wait_for_spans(1)
    assert b"SECRET" not in received.SerializeToString()
    expected = {attribute.key for attribute in kept}
    assert {attribute.key for attribute in received.attributes} == expected
    assert {attribute.key for attribute in received.events[0].attributes} == expected
