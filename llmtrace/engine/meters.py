"""Where the plugin's own metrics go.

vLLM's own metrics are Prometheus's; it sets up no OpenTelemetry meter provider. Where the process has one, it is used;
else, where OTEL_* variables name a place for metrics, a small one is made; else the metrics go nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from opentelemetry import metrics
from opentelemetry.metrics import Meter, MeterProvider

from llmtrace import __version__
from llmtrace.semconv import attributes as names

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def meter(environment: Mapping[str, str] = os.environ) -> Meter:
    """The plugin's meter in this process."""
    return provider(environment).get_meter(names.ENGINE_SCOPE, __version__)


def provider(environment: Mapping[str, str] = os.environ) -> MeterProvider:
    """The one of this process, or a new one of the plugin's own."""
    return _own_provider() if _wanted(environment) and not _has_provider() else metrics.get_meter_provider()


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
