"""Switching vLLM's tracing on by OpenTelemetry's environment variables, without a flag."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from llmtrace.engine.hooks import logger

TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
_GRPC, _HTTP = "grpc", "http/protobuf"


def traces_endpoint(environment: Mapping[str, str]) -> str | None:
    """Where traces go by the variables alone; None where they ask for none.

    As OpenTelemetry has it, the path of the traces belongs to OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and is added to
    OTEL_EXPORTER_OTLP_ENDPOINT with HTTP.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("", "otlp"):
        return None
    if own := environment.get(TRACES_ENDPOINT):
        return own
    endpoint = environment.get(ENDPOINT)
    if endpoint and (environment.get(TRACES_PROTOCOL) or environment.get(PROTOCOL)) == _HTTP:
        return endpoint.rstrip("/") + "/v1/traces"
    return endpoint or None


def switch_on(config: Any, *, log_stats: bool = True, environment: MutableMapping[str, str] = os.environ) -> None:
    """Do for vLLM's configuration what ``--otlp-traces-endpoint`` does, if only the variables ask for it.

    Not without statistics: vLLM takes the times of ``llm_request`` from them, and a request would fail. Not with a
    protocol that vLLM does not speak: it would not start.
    """
    observability = config.observability_config
    endpoint = traces_endpoint(environment)
    if endpoint is None or observability.otlp_traces_endpoint is not None:
        return
    if not log_stats:
        logger.warning("llmtrace: no tracing by OTEL_* variables: vLLM's needs its statistics (--disable-log-stats)")
        return
    protocol = environment.get(TRACES_PROTOCOL) or environment.get(PROTOCOL) or _GRPC
    if protocol not in (_GRPC, _HTTP):
        logger.warning("llmtrace: no tracing by OTEL_* variables: vLLM speaks %s and %s only", _GRPC, _HTTP)
        return
    environment[TRACES_PROTOCOL] = protocol  # the only one that vLLM reads
    observability.otlp_traces_endpoint = endpoint
    logger.info("llmtrace: tracing switched on by OTEL_* variables")
