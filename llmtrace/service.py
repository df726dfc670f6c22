"""The frame of the kit's own services: a command line that serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import uvloop

from llmtrace.errors import UserError
from llmtrace.telemetry import Tracing

SWITCH_INTERVAL_S = 0.0002


class Server(Protocol):
    """What serves."""

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""


def command(name: str, work: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Do ``work`` with the arguments of the command line, and return the exit code: 2 where it raises UserError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        work(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def serve(make: Callable[[], Server], tracing: Tracing) -> None:
    """Run what ``make`` returns until SIGINT or SIGTERM, and export its last spans."""
    # Spans are encoded in a thread of their own: by default it may keep a request waiting for 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        uvloop.run(_until_told(make()))
    finally:
        tracing.shutdown()


async def _until_told(server: Server) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.run(stop)
