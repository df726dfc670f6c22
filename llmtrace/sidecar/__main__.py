"""``python -m llmtrace.sidecar``: the embedded P/D sidecar, started with the flags of llm-d's pd-sidecar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from opentelemetry.sdk.trace import TracerProvider

from llmtrace import service
from llmtrace.semconv.attributes import SIDECAR_SERVICE
from llmtrace.sidecar.flags import config
from llmtrace.sidecar.server import SidecarServer
from llmtrace.spans import FastSpanExporter
from llmtrace.telemetry import Tracing, setup_tracing


class _Broken(logging.Filter):
    """Leaves out what uvicorn says about a response that is broken off on purpose; the sidecar has said why."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sidecar until it is told to stop; returns the exit code."""
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel(logging.WARNING)
    uvicorn_log.addFilter(_Broken())
    return service.command("llmtrace.sidecar", _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    found = config(arguments)
    logging.getLogger("llmtrace").setLevel(found.log_level)
    if found.tracing:
        tracing = setup_tracing(SIDECAR_SERVICE, exporter=FastSpanExporter)
    else:
        tracing = Tracing(TracerProvider(), None)
    service.serve(lambda: SidecarServer(found, tracing), tracing)


if __name__ == "__main__":
    sys.exit(main())
