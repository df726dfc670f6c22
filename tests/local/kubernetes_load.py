"""What a picker and vLLM would send of a load that a test makes: a queue's metric, and traces in a trace store."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from uuid import uuid4

import httpx
from example_scaling import MODEL, REPORTS, SECOND, T0, request
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily

from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import stay
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.otlp import encode

NAMESPACE = "llm-d"
QUEUE, RUNNING = "llm_d_epp_flow_control_queue_size", "llm_d_epp_request_running"
MODELS = {"reports": REPORTS, "chats": MODEL}
CHATS = 5
LONGEST_S, RUN_S = 4.0, 0.5
"""How long a request waits at most, and how long it runs."""


class Sink:
    """Writes traces to a store, as a collector would."""

    def __init__(self, store: str) -> None:
        self._client = httpx.Client(base_url=store, trust_env=False, timeout=10)

    def send(self, trace: Trace) -> None:
        body = encode(trace.spans).SerializeToString()
        headers = {"Content-Type": "application/x-protobuf"}
        self._client.post("/v1/traces", content=body, headers=headers).raise_for_status()


class Load(threading.Thread):
    """A queue in which as many reports wait as the test says, and five chats, for which nothing is scaled.

    One that has waited long enough is served, and another takes its place. A request's trace is sent when it has
    ended. ``scrapes`` has what Prometheus was told: when, and the trace ids of the reports that were counted.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__(daemon=True)
        self.scrapes: list[tuple[float, frozenset[str]]] = []
        self.requests: list[Trace] = []
        self._sink = sink
        self._wanted = {"reports": 0, "chats": CHATS}
        self._waiting: dict[str, deque[tuple[int, float]]] = {kind: deque() for kind in MODELS}
        self._running: deque[tuple[float, Trace]] = deque()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        registry = CollectorRegistry()
        registry.register(self)
        self._server, _ = start_http_server(0, "127.0.0.1", registry)
        self.port: int = self._server.server_port

    def wait(self, reports: int) -> None:
        """So many wait from now on."""
        with self._lock:
            self._wanted["reports"] = reports
            self._turn(time.time())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["namespace", "model_name"]
        waiting = GaugeMetricFamily(QUEUE, "Requests that wait.", labels=labels)
        running = GaugeMetricFamily(RUNNING, "Requests that run.", labels=labels)
        with self._lock:
            for kind, model in MODELS.items():
                waiting.add_metric([NAMESPACE, model], len(self._waiting[kind]))
                run = sum((s := stay(t)) is not None and s.model == model for _, t in self._running)
                running.add_metric([NAMESPACE, model], run)
            reports = frozenset(f"{number:032x}" for number, _ in self._waiting["reports"])
            self.scrapes.append((time.time(), reports))
        yield from (waiting, running)

    def run(self) -> None:
        while not self._ended.wait(0.1):
            now = time.time()
            with self._lock:
                self._turn(now)
                while self._running and self._running[0][0] <= now:
                    self.requests.append(self._running.popleft()[1])
                    self._sink.send(self.requests[-1])

    def close(self) -> None:
        self._ended.set()
        self.join()
        self._server.shutdown()
        self._server.server_close()

    def _turn(self, now: float) -> None:
        for kind, line in self._waiting.items():
            while line and (len(line) > self._wanted[kind] or now - line[0][1] > LONGEST_S):
                number, since = line.popleft()
                trace = request(number, since - T0 / SECOND, now - since, RUN_S, kind=kind)
                self._running.append((now + RUN_S, trace))
            while len(line) < self._wanted[kind]:
                line.append((next(self._numbers), now))


def startup(pod: str, begun_s: float) -> Trace:
    """vLLM's own spans of a start: 0.1 s after this time it loads the model, for 0.05 s."""
    core = (a.VLLM_CORE_SPAN, begun_s + 0.05, begun_s + 0.15)
    return _of(pod, core, (a.VLLM_LOADING_CPU_SPAN, begun_s + 0.1, begun_s + 0.12))


def served(pod: str, at_s: float) -> Trace:
    """A request that a pod served: it came at this time, and its first token 0.3 s later."""
    return _of(pod, (a.SERVER_SPAN, at_s, at_s + 0.5), attributes={a.VLLM_TTFT: 0.3})


def _of(pod: str, *times: tuple[str, float, float], attributes: dict[str, float] | None = None) -> Trace:
    trace_id, resource = uuid4().hex, {"service.name": "vllm", "k8s.pod.name": pod}
    spans = (
        Span(
            trace_id, f"{number:016x}", None, name, "INTERNAL", int(start * SECOND), int(end * SECOND),
            attributes=dict(attributes or {}), resource=resource,
        )
        for number, (name, start, end) in enumerate(times, 1)
    )  # fmt: skip
    return Trace(trace_id, tuple(spans))
