"""Tracing set-up shared by the kit's own processes."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

SHUTDOWN_S = 5.0
NO_PROXY = (("grpc.enable_http_proxy", 0),)
"""A collector is reached directly: gRPC would send even loopback through an http_proxy of the environment."""
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True)
class Tracing:
    """A tracer provider, the processor that exports its spans, and what it exports with; None where nothing is."""

    provider: TracerProvider
    processor: SpanProcessor | None
    exporter: SpanExporter | None = None

    def shutdown(self, timeout_s: float = SHUTDOWN_S) -> None:
        """Export what is queued, within ``timeout_s``: a collector that is not there must not hold up the end."""
        thread = threading.Thread(target=self.provider.shutdown, daemon=True)
        thread.start()
        thread.join(timeout_s)


def setup_tracing(
    service_name: str,
    instance_id: str | None = None,
    *,
    default_endpoint: str | None = None,
    exporter: type[OTLPSpanExporter] = OTLPSpanExporter,
) -> Tracing:
    """Make a tracer provider that exports by OTLP gRPC, configured by the OTEL_* variables of the SDK.

    ``service_name`` and ``instance_id`` become service.name and service.instance.id; OTEL_SERVICE_NAME and
    OTEL_RESOURCE_ATTRIBUTES overrule them. ``default_endpoint`` (http://host:port) is used where no variable
    names an endpoint; without either, the SDK's http://localhost:4317. OTEL_SDK_DISABLED=true and
    OTEL_TRACES_EXPORTER=none give a provider that exports nothing. The provider is not made global: the
    caller owns it and shuts it down.
    """
    identity = {"service.name": service_name} | ({"service.instance.id": instance_id} if instance_id else {})
    provider = TracerProvider(resource=Resource.create({**identity, **OTELResourceDetector().detect().attributes}))
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return Tracing(provider, None)
    endpoint = None if any(os.environ.get(name) for name in ENDPOINT_VARIABLES) else default_endpoint
    insecure = True if endpoint and endpoint.startswith("http://") else None
    made = exporter(endpoint=endpoint, insecure=insecure, channel_options=NO_PROXY)  # type: ignore[arg-type]  # gRPC wants an int
    processor = BatchSpanProcessor(made)
    provider.add_span_processor(processor)
    return Tracing(provider, processor, made)
