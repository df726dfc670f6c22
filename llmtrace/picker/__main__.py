"""``python -m llmtrace.picker``: the embedded endpoint picker, started with the flags of llm-d's EPP."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrace import service
from llmtrace.flags import Parser, duration, port
from llmtrace.picker.server import Options, PickerServer
from llmtrace.spans import FastSpanExporter, Tracer
from llmtrace.telemetry import setup_tracing

SERVICE_NAME = "llm-d-epp"
SCOPE = "llmtrace.picker"
DEFAULT_REFRESH = "500ms"


def _false(text: str) -> bool:
    if text.lower() in ("false", "0", "f"):
        return False
    raise argparse.ArgumentTypeError("the embedded picker has only false")


def options(arguments: Sequence[str]) -> Options:
    """Read the command line; raises UserError where it is wrong."""
    parser = Parser("python -m llmtrace.picker", __doc__)
    parser.add_argument("--pool-name", required=True, help="name of the inference pool, a metric label")
    parser.add_argument("--pool-namespace", default="default", help="namespace of the inference pool")
    parser.add_argument("--config-file", required=True, type=Path, help="EndpointPickerConfig file")
    parser.add_argument("--bind-address", default="127.0.0.1", help="address that all ports listen on")
    parser.add_argument("--grpc-port", default=9002, type=port, help="port of Envoy's external processing")
    parser.add_argument("--grpc-health-port", default=9003, type=port, help="port of the gRPC health service")
    parser.add_argument("--metrics-port", default=9090, type=port, help="port of the Prometheus metrics")
    parser.add_argument(
        "--refresh-metrics-interval",
        default=duration(DEFAULT_REFRESH),
        type=duration,
        help=f"time between two scrapes of an endpoint (default {DEFAULT_REFRESH}; llm-d's EPP: 50ms)",
    )
    # TLS and authorisation are llm-d's; its own command line is accepted where it asks for neither.
    parser.add_argument("--secure-serving", type=_false, default=False, help="must be false")
    parser.add_argument("--metrics-endpoint-auth", type=_false, default=False, help="must be false")
    found = parser.parse_args(arguments)
    return Options(
        found.pool_name,
        found.pool_namespace,
        found.config_file,
        found.bind_address,
        found.grpc_port,
        found.grpc_health_port,
        found.metrics_port,
        found.refresh_metrics_interval,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the picker until it is told to stop; returns the exit code."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return service.command("llmtrace.picker", _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    found = options(arguments)
    tracing = setup_tracing(SERVICE_NAME, exporter=FastSpanExporter)
    service.serve(lambda: PickerServer(found, Tracer(tracing.provider, tracing.processor, SCOPE)), tracing)


if __name__ == "__main__":
    sys.exit(main())
