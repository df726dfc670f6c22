"""The metric of requests whose engine spans were dropped.

vLLM's own metrics are Prometheus's; it sets up no OpenTelemetry meter provider. Where the process has one, it is used;
else, where OTEL_* variables name a place for metrics, a small one is made; else the count is only in the log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from llmtrace import __version__
from llmtrace.semconv import attributes as names

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def publish(dropped: Callable[[], int], environment: Mapping[str, str] = os.environ) -> MeterProvider | None:
    """Offer ``dropped()`` as a counter from now on: to the provider that was made for it, if one was."""
    own = _own_provider() if _wanted(environment) and not _has_provider() else None
    provider = own or metrics.get_meter_provider()

    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(dropped())]

    provider.get_meter(names.ENGINE_SCOPE, __version__).create_observable_counter(
        names.ENGINE_DROPPED_METRIC, [observe], "{request}", "Requests without engine spans: their queue was full"
    )
    return own


def _wanted(environment: Mapping[str, str]) -> bool:
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    kind = environment.get("OTEL_METRICS_EXPORTER", "otlp").strip().lower()
    grpc = environment.get(
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    )
    return not off and kind == "otlp" and grpc == "grpc" and any(environment.get(name) for name in _ENDPOINTS)


def _has_provider() -> bool:
    return hasattr(metrics.get_meter_provider(), "force_flush")


def _own_provider() -> MeterProvider:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk import metrics as sdk
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return sdk.MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
