"""``python -m llmtrace.autoscale``: the local scaler, which stands in for KEDA and the HorizontalPodAutoscaler."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrace import service
from llmtrace.autoscale import scaled_object
from llmtrace.autoscale.fleet import Patience
from llmtrace.autoscale.scaler import Options, Scaler
from llmtrace.deploy.supervisor import Supervisor
from llmtrace.endpoints_file import parse, read
from llmtrace.flags import Parser, duration, port
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import setup_tracing


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


def options(arguments: Sequence[str]) -> tuple[Options, Path]:
    """The options of a command line, and supervisord's socket; raises UserError where it is wrong."""
    parser = Parser("python -m llmtrace.autoscale", __doc__)
    parser.add_argument("--config", required=True, type=Path, help="a ScaledObject (keda.sh/v1alpha1)")
    parser.add_argument("--replicas", required=True, type=Path, help="every replica, in order, as an endpoints file")
    parser.add_argument("--endpoints", required=True, type=Path, help="the picker's endpoints file, which is written")
    parser.add_argument("--supervisor", required=True, type=Path, help="socket of the supervisord that runs replicas")
    parser.add_argument("--state", required=True, type=Path, help="file that keeps what a restart goes on with")
    parser.add_argument("--store", default="", help="base URL of the trace store, to link decisions to requests")
    parser.add_argument("--bind-address", default="127.0.0.1", help="address of the scaler's own metrics")
    parser.add_argument("--port", default=9092, type=port, help="port of the scaler's own metrics (9092)")
    for flag, default, help_ in (
        ("--period", "15s", "time between two decisions, the HPA's sync period"),
        ("--sample-age", "10s", "how old a sample of the metrics may be, about twice the scrape interval"),
        ("--settle", "30s", "time after a decision until its trace is sent, at the earliest"),
        ("--ready-timeout", "5m", "time for a replica to become ready"),
        ("--first-request-timeout", "1m", "time to wait for its first request"),
        ("--drain-grace", "1m", "time for a replica's requests to end before it is stopped"),
        ("--retry", "1m", "time until a failed start is repeated"),
    ):
        parser.add_argument(flag, default=duration(default), type=duration, help=f"{help_} ({default})")
    parser.add_argument("--accelerators", default=1.0, type=_amount, help="accelerators of a replica (1)")
    parser.add_argument("--price", default=0.0, type=_amount, help="price of an accelerator for an hour (0)")
    found = parser.parse_args(arguments)
    made = Options(
        scaled_object=scaled_object.load(found.config),
        replicas=parse(read(found.replicas), found.replicas),
        endpoints=found.endpoints,
        state=found.state,
        store=found.store,
        host=found.bind_address,
        port=found.port,
        period_s=found.period,
        window_s=found.sample_age,
        settle_s=found.settle,
        accelerators=found.accelerators,
        price=found.price,
        patience=Patience(
            ready_s=found.ready_timeout,
            first_request_s=found.first_request_timeout,
            drain_s=found.drain_grace,
            retry_s=found.retry,
        ),
    )
    return made, found.supervisor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scaler until it is told to stop; returns the exit code."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return service.command("llmtrace.autoscale", _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    found, socket = options(arguments)
    tracing = setup_tracing(a.SCALER_SERVICE, found.scaled_object.metadata.name)
    service.serve(lambda: Scaler(found, Supervisor(socket), tracing), tracing)


if __name__ == "__main__":
    sys.exit(main())
