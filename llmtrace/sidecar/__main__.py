"""``python -m llmtrace.sidecar``: the embedded P/D sidecar, started with the flags of llm-d's pd-sidecar."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

import uvloop
from opentelemetry.sdk.trace import TracerProvider

from llmtrace.errors import UserError
from llmtrace.semconv.attributes import SIDECAR_SERVICE
from llmtrace.sidecar.flags import config
from llmtrace.sidecar.server import SidecarServer
from llmtrace.spans import FastSpanExporter
from llmtrace.telemetry import Tracing, setup_tracing

SWITCH_INTERVAL_S = 0.0002


class _Broken(logging.Filter):
    """Leaves out what uvicorn says about a response that is broken off on purpose; the sidecar has said why."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


async def _serve(server: SidecarServer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.run(stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sidecar until it is told to stop; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel(logging.WARNING)
    uvicorn_log.addFilter(_Broken())
    try:
        found = config(sys.argv[1:] if arguments is None else arguments)
        logging.getLogger("llmtrace").setLevel(found.log_level)
        if found.tracing:
            tracing = setup_tracing(SIDECAR_SERVICE, exporter=FastSpanExporter)
        else:
            tracing = Tracing(TracerProvider(), None)
        try:
            # Spans are encoded in a thread of their own: by default it may keep a request waiting for 5 ms.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            uvloop.run(_serve(SidecarServer(found, tracing)))
        finally:
            tracing.shutdown()
    except UserError as error:
        print(f"llmtrace.sidecar: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
