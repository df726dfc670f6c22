"""``python -m llmtrace.traces.store``: runs the store until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

import uvicorn

from llmtrace.errors import UserError
from llmtrace.flags import listen
from llmtrace.traces.store.app import create_app
from llmtrace.traces.store.database import Database
from llmtrace.traces.store.retention import MIN_MAX_BYTES, Retention

_EXIT_USER_ERROR, _EXIT_FATAL = 2, 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m llmtrace.traces.store --help")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m llmtrace.traces.store",
        description="Stores traces sent by OTLP/HTTP and serves them by Tempo's HTTP API.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=13200, help="port to listen on (13200)")
    parser.add_argument("--db", type=Path, required=True, help="the DuckDB file, made when missing")
    parser.add_argument("--retention-hours", type=float, default=168, help="hours that traces are kept (168)")
    parser.add_argument("--max-bytes", type=int, default=2 * 2**30, help="bytes that the file may use (2147483648)")
    options = parser.parse_args(arguments)
    if not 0 < options.port < 65536:
        parser.error("argument --port: must be from 1 to 65535")
    if not 0 < options.retention_hours < 1e6:
        parser.error("argument --retention-hours: must be more than 0")
    if options.max_bytes < MIN_MAX_BYTES:
        parser.error(f"argument --max-bytes: must be at least {MIN_MAX_BYTES}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the store; returns the exit code: 2 for bad flags or an unusable file, 1 when the file broke."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        options = _arguments(arguments)
        listener = listen(options.host, options.port)
        database = Database(options.db, Retention(options.retention_hours, options.max_bytes))
    except UserError as error:
        print(f"store: {error}", file=sys.stderr)
        return _EXIT_USER_ERROR
    config = uvicorn.Config(
        create_app(database),
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    database.on_fatal = stop
    # uvicorn raises the signal again after its shutdown; then the file is to be closed still.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        database.close()
    return _EXIT_FATAL if database.failed else 0


if __name__ == "__main__":
    sys.exit(main())
