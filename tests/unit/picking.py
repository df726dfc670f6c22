"""A picker without ports: configuration, endpoints and exchanges driven by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from memory import Memory
from opentelemetry.sdk.trace import TracerProvider

from llmtrace.picker import config
from llmtrace.picker.endpoints import Endpoint, Load, Pool
from llmtrace.picker.exchange import Exchange, Services
from llmtrace.picker.ext_proc import ProcessingRequest
from llmtrace.picker.flow_control import FlowControl
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.scheduler import Scheduler
from llmtrace.spans import Tracer
from llmtrace.traces.model import Span

PREFIX_AWARE: dict[str, Any] = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "plugins": [
        {"name": "endpoints", "type": "file-discovery", "parameters": {"path": "endpoints.yaml"}},
        {
            "type": "approx-prefix-cache-producer",
            "parameters": {"autoTune": False, "blockSizeTokens": 64, "lruCapacityPerServer": 31250},
        },
        {"type": "prefix-cache-scorer"},
        {"type": "queue-scorer"},
        {"type": "kv-cache-utilization-scorer"},
        {"type": "max-score-picker"},
    ],
    "schedulingProfiles": [
        {
            "name": "default",
            "plugins": [
                {"pluginRef": "prefix-cache-scorer", "weight": 2},
                {"pluginRef": "queue-scorer", "weight": 1},
                {"pluginRef": "kv-cache-utilization-scorer", "weight": 1},
                {"pluginRef": "max-score-picker"},
            ],
        }
    ],
    "dataLayer": {"discovery": {"pluginRef": "endpoints"}},
}

FLOW_CONTROLLED: dict[str, Any] = {
    **PREFIX_AWARE,
    "featureGates": ["flowControl"],
    "plugins": [
        *PREFIX_AWARE["plugins"],
        {"type": "utilization-detector", "parameters": {"queueDepthThreshold": 2, "metricsStalenessThreshold": "5s"}},
    ],
    "flowControl": {"maxRequests": 3, "defaultRequestTTL": "60s"},
}
"""A request waits while two requests wait at each endpoint, as long as fewer than three wait before it."""

DISAGGREGATED: dict[str, Any] = {
    **PREFIX_AWARE,
    "plugins": [
        *PREFIX_AWARE["plugins"][:4],
        {"type": "prefix-based-pd-decider", "parameters": {"nonCachedTokens": 512}},
        {"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": "prefix-based-pd-decider"}}},
        {"type": "prefill-filter"},
        {"type": "decode-filter"},
        {"type": "max-score-picker"},
    ],
    "schedulingProfiles": [
        {
            "name": "prefill",
            "plugins": [
                {"pluginRef": "prefill-filter"},
                {"pluginRef": "queue-scorer", "weight": 1},
                {"pluginRef": "max-score-picker"},
            ],
        },
        {
            "name": "decode",
            "plugins": [
                {"pluginRef": "decode-filter"},
                {"pluginRef": "prefix-cache-scorer", "weight": 2},
                {"pluginRef": "queue-scorer", "weight": 1},
                {"pluginRef": "max-score-picker"},
            ],
        },
    ],
}
"""llm-d's example of prefill/decode disaggregation, with the threshold of the recorded traces."""


def endpoint(number: int, *, ready: bool = True, name: str = "vllm", net: int = 0, **load: Any) -> Endpoint:
    known = Load(waiting_known="waiting" in load, **load)
    made = Endpoint(f"{name}-{number}", "default", f"10.{net}.0.{number + 1}", "8000", load=known)
    made.answered_at = time.monotonic() if ready else None
    return made


def server(role: str, number: int = 0, **load: Any) -> Endpoint:
    """A model server of this role: default/prefill-0 at 10.1.0.1, default/decode-0 at 10.2.0.1, others at 10.3.0.1."""
    made = endpoint(number, name=role, net={"prefill": 1, "decode": 2}.get(role, 3), **load)
    made.labels = {"llm-d.ai/role": role}
    return made


@dataclass
class Handle:
    """What a plugin is given."""

    pool: Pool = field(default_factory=lambda: Pool("pool"))
    metrics: Metrics = field(init=False)
    tracer: Tracer = field(default_factory=lambda: Tracer(TracerProvider(), None, "test"))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.pool)


class PromptExchange(Exchange):
    """An exchange that waits for nothing, for tests without an event loop."""

    def handle(self, message: Any) -> list[Any]:  # type: ignore[override]
        step = super().handle(message)
        try:
            step.send(None)
        except StopIteration as done:
            return list(done.value)
        step.close()
        raise AssertionError("the exchange waits")


class Picker:
    """A picker whose spans and metrics can be looked at."""

    def __init__(
        self, tmp_path: Path, content: dict[str, Any] | None = None, endpoints: int | Iterable[Endpoint] = 2
    ) -> None:
        self.memory = Memory()
        self.tracer = Tracer(TracerProvider(), self.memory, "test")
        self.handle = Handle(tracer=self.tracer)
        self.handle.pool.replace(map(endpoint, range(endpoints)) if isinstance(endpoints, int) else endpoints)
        path = tmp_path / "picker.yaml"
        path.write_text(yaml.safe_dump(content or PREFIX_AWARE))
        self.configuration = config.load(path, self.handle)
        self.scheduler = Scheduler(self.configuration, self.handle.metrics, self.tracer)
        flow = self.configuration.flow_control
        self.flow_control = FlowControl(flow, self.handle.pool, self.handle.metrics) if flow else None
        self.services = Services.make(
            self.handle.pool, self.scheduler, self.handle.metrics, self.tracer, self.flow_control
        )

    @property
    def spans(self) -> list[Span]:
        return self.memory.spans()

    def span(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def exchange(self, metadata: dict[str, str] | None = None) -> PromptExchange:
        return PromptExchange(self.services, metadata or {})

    def value(self, name: str, /, **labels: str) -> float | None:
        return self.handle.metrics.registry.get_sample_value(name, labels)


def request_headers(*, end_of_stream: bool = False, **headers: str) -> Any:
    message = ProcessingRequest()
    message.request_headers.end_of_stream = end_of_stream
    values = {":method": "POST", ":path": "/v1/chat/completions", "x-request-id": "r1"}
    for key, value in {**values, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    return message


def request_body(body: bytes, *, end_of_stream: bool = True) -> Any:
    message = ProcessingRequest()
    message.request_body.body = body
    message.request_body.end_of_stream = end_of_stream
    return message


def response_headers(status: int = 200, content_type: str = "application/json") -> Any:
    message = ProcessingRequest()
    for key, value in ((":status", str(status)), ("content-type", content_type)):
        message.response_headers.headers.headers.add(key=key, raw_value=value.encode())
    return message


def response_body(body: bytes, *, end_of_stream: bool = True) -> Any:
    message = ProcessingRequest()
    message.response_body.body = body
    message.response_body.end_of_stream = end_of_stream
    return message


def chat(content: str = "Hello", **fields: Any) -> bytes:
    return json.dumps({"model": "smol", "messages": [{"role": "user", "content": content}], **fields}).encode()


def headers_removed(response: Any) -> list[str]:
    return list(response.request_headers.response.header_mutation.remove_headers)


def headers_set(response: Any, part: str = "request_headers") -> dict[str, str]:
    mutation = getattr(response, part).response.header_mutation
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
