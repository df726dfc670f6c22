"""A scaler whose Prometheus, supervisord and replicas are small servers of this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmtrace.autoscale.fleet import Patience
from llmtrace.autoscale.scaled_object import ScaledObject
from llmtrace.autoscale.scaler import Options, Scaler
from llmtrace.deploy.supervisor import Process
from llmtrace.endpoints_file import EndpointEntry, parse
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing
from llmtrace.traces import otlp
from llmtrace.traces.model import Trace

QUEUE = 'sum(llm_d_epp_flow_control_queue_size{model_name="reports"})'
RUNNING = 'sum(llm_d_epp_request_running{model_name="reports"})'
VLLM_LOG = "INFO Initializing a V1 LLM engine (v0.32.0)\nINFO init engine (profile, create kv cache) took 0.2 s\n"


@dataclass
class Web:
    """A server on loopback; ``pages`` gives status and body by path."""

    pages: Callable[[str], tuple[int, str]]
    port: int = 0

    @contextmanager
    def serving(self) -> Iterator[Web]:
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = pages(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        try:
            yield self
        finally:
            server.shutdown()


@dataclass
class Replica:
    """A model server: it answers while its process runs and it is ``healthy``."""

    running: bool = False
    healthy: bool = True
    requests: int = 0
    tokens: int = 0

    def page(self, path: str) -> tuple[int, str]:
        if not (self.running and self.healthy):
            return 503, ""
        if path == "/health":
            return 200, ""
        return 200, (
            f'vllm:num_requests_running{{engine="0"}} {self.requests}.0\n'
            'vllm:num_requests_waiting{engine="0"} 0.0\n'
            f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n'
        )


@dataclass
class Processes:
    """A supervisord: what it was told, and the states of its processes."""

    replicas: dict[str, Replica]
    folder: Path
    told: list[str] = field(default_factory=list)
    fatal: set[str] = field(default_factory=set)
    gone: bool = False
    log: str = VLLM_LOG

    def processes(self) -> list[Process]:
        if self.gone:
            raise UserError("No supervisord answers")
        return [
            Process(name, self._state(name), 1 if r.running else 0, 1, self.folder / f"{name}.log")
            for name, r in self.replicas.items()
        ]

    def _state(self, name: str) -> str:
        return "FATAL" if name in self.fatal else "RUNNING" if self.replicas[name].running else "STOPPED"

    def process(self, name: str) -> Process:
        return next(p for p in self.processes() if p.name == name)

    def start(self, name: str) -> None:
        if self.process(name).state != "RUNNING":
            self.told.append(f"start {name}")
            with (self.folder / f"{name}.log").open("a") as file:
                file.write(self.log)
            self.replicas[name].running = name not in self.fatal

    def stop(self, name: str) -> None:
        if self.process(name).state == "RUNNING":
            self.told.append(f"stop {name}")
            self.replicas[name].running = False
            self.replicas[name].tokens = 0


@dataclass
class Load:
    """What Prometheus says; None for nothing at all."""

    queue: float | None = 0.0
    running: float | None = 0.0
    status: int = 200

    def page(self, path: str) -> tuple[int, str]:
        value = self.queue if "queue_size" in path else self.running
        result = [] if value is None else [{"metric": {}, "value": [1.0, str(value)]}]
        answer = {"status": "success", "data": {"resultType": "vector", "result": result}}
        return self.status, json.dumps(answer if self.status == 200 else {"status": "error", "error": "no"})


def scaled_object(address: str, **spec: Any) -> dict[str, Any]:
    def trigger(name: str, query: str, threshold: str) -> dict[str, Any]:
        metadata = {"serverAddress": address, "query": query, "threshold": threshold, "ignoreNullValues": "false"}
        return {"type": "prometheus", "name": name, "metricType": "AverageValue", "metadata": metadata}

    behavior = {
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 1}]},
        "scaleDown": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 9, "periodSeconds": 1}]},
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "vllm", "namespace": "default"},
        "spec": {
            "scaleTargetRef": {"name": "vllm"},
            "minReplicaCount": 1,
            "maxReplicaCount": 3,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [trigger("queue", QUEUE, "1"), trigger("running", RUNNING, "4")],
            **spec,
        },
    }


FAST = Patience(ready_s=5, first_request_s=0.3, drain_s=0.3, notice_s=0.01, retry_s=0.2, look_s=0.01)


class Stand:
    """Everything around a scaler; :meth:`scaler` makes one, any number of times, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load = Load()
        self.replicas = {f"vllm-{n}": Replica() for n in range(3)}
        self.processes = Processes(self.replicas, folder)
        self.exporter = InMemorySpanExporter()
        self.endpoints = folder / "endpoints.yaml"
        self.options: dict[str, Any] = {}
        self._entries: list[EndpointEntry] = []
        self._prometheus = Web(self.load.page)

    @contextmanager
    def serving(self) -> Iterator[Stand]:
        webs = [Web(r.page) for r in self.replicas.values()]
        with self._prometheus.serving():
            managers = [web.serving() for web in webs]
            for manager in managers:
                manager.__enter__()
            self._entries = [
                EndpointEntry(name=name, address="127.0.0.1", port=str(web.port), labels={"llm-d.ai/model": "m"})
                for name, web in zip(self.replicas, webs, strict=True)
            ]
            try:
                yield self
            finally:
                for manager in managers:
                    manager.__exit__(None, None, None)

    def scaler(self, **spec: Any) -> Scaler:
        content = scaled_object(f"http://127.0.0.1:{self._prometheus.port}", **spec)
        values = {
            "scaled_object": ScaledObject.model_validate(content),
            "replicas": self._entries,
            "endpoints": self.endpoints,
            "state": self.folder / "state.json",
            "settle_s": 0.0,
            "patience": FAST,
            **self.options,
        }
        provider = TracerProvider(resource=Resource.create({"service.name": a.SCALER_SERVICE}))
        processor = SimpleSpanProcessor(self.exporter)
        return Scaler(Options(**values), self.processes, Tracing(provider, processor, self.exporter))

    def address(self, name: str) -> str:
        """Where a replica listens."""
        return next(f"{e.address}:{e.port}" for e in self._entries if e.name == name)

    def listed(self) -> list[str]:
        """The replicas in the picker's file."""
        return [entry.name for entry in parse(self.endpoints.read_bytes(), self.endpoints)]

    def traces(self) -> list[Trace]:
        """The traces that were sent, in order of time."""
        groups: dict[str, list[Any]] = {}
        for span in otlp.spans(encode_spans(self.exporter.get_finished_spans()).resource_spans):
            groups.setdefault(span.trace_id, []).append(span)
        found = [Trace(trace_id, tuple(replace(s) for s in spans)) for trace_id, spans in groups.items()]
        return sorted(found, key=lambda t: t.spans[0].start_ns)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        await asyncio.sleep(0.01)
