"""``python -m llmtrace.autoscale.kubernetes``: watches a cluster's scalers, and traces their decisions."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrace import service
from llmtrace.autoscale.kubernetes.api import Api
from llmtrace.autoscale.kubernetes.controller import Options, Watcher
from llmtrace.autoscale.kubernetes.ledger import Prices
from llmtrace.autoscale.kubernetes.progress import Patience
from llmtrace.errors import UserError
from llmtrace.flags import Parser, duration, port
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing, setup_tracing

SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def options(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    """The options of a command line, and the kubeconfig; raises UserError where it is wrong."""
    parser = Parser("python -m llmtrace.autoscale.kubernetes", __doc__)
    parser.add_argument("--kubeconfig", type=Path, help="a kubeconfig; without it, the pod's service account")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--namespace", default="", help="the namespace to watch (that of the watcher)")
    chosen.add_argument("--all-namespaces", action="store_true", help="watch every namespace")
    parser.add_argument("--own-namespace", default="", help="where its Lease and its ConfigMap are (that of the pod)")
    parser.add_argument("--name", default="llmtrace-autoscale", help="name of its Lease and its ConfigMap")
    parser.add_argument("--identity", default=socket.gethostname(), help="tells watchers apart (the host's name)")
    parser.add_argument("--store", default="", help="base URL of the trace store, to link decisions to requests")
    parser.add_argument("--bind-address", default="127.0.0.1", help="address of the watcher's own metrics")
    parser.add_argument("--port", default=9092, type=port, help="port of the watcher's own metrics (9092)")
    for flag, default, help_ in (
        ("--lease-duration", "15s", "time after which another watcher leads where this one is silent"),
        ("--sample-age", "30s", "how old a sample of the scaler's metrics may be"),
        ("--settle", "30s", "time after a decision until its trace is sent, at the earliest"),
        ("--ready-timeout", "30m", "time for a replica to become ready"),
        ("--first-request-timeout", "1m", "time to wait for its first request"),
    ):
        parser.add_argument(flag, default=duration(default), type=duration, help=f"{help_} ({default})")
    parser.add_argument("--accelerators", default=1.0, type=_amount, help="of a replica whose pods name none (1)")
    parser.add_argument("--price", default=0.0, type=_amount, help="price of an accelerator for an hour (0)")
    found = parser.parse_args(arguments)
    home = found.own_namespace or _own_namespace(found.kubeconfig)
    made = Options(
        namespace="" if found.all_namespaces else found.namespace or home,
        home=home,
        identity=found.identity,
        name=found.name,
        store=found.store,
        host=found.bind_address,
        port=found.port,
        lease_s=found.lease_duration,
        prices=Prices(found.sample_age * 1e3, found.accelerators, found.price),
        patience=Patience(
            ready_s=found.ready_timeout, first_request_s=found.first_request_timeout, settle_s=found.settle
        ),
    )
    return made, found.kubeconfig


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


def _own_namespace(kubeconfig: Path | None) -> str:
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        where = " with --kubeconfig" if kubeconfig else ""
        raise UserError(f"the watcher's own namespace is not known{where}: give --own-namespace") from None


class _Connected:
    """A watcher that connects when it runs: the client belongs to the loop."""

    def __init__(self, found: Options, kubeconfig: Path | None, tracing: Tracing) -> None:
        self._found = found
        self._kubeconfig = kubeconfig
        self._tracing = tracing

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until ``stop`` is set."""
        await Watcher(self._found, await Api.connect(self._kubeconfig), self._tracing).run(stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the watcher until it is told to stop; returns the exit code."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return service.command("llmtrace.autoscale", _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    found, kubeconfig = options(arguments)
    tracing = setup_tracing(a.SCALER_SERVICE, os.environ.get("POD_NAME") or found.identity)
    service.serve(lambda: _Connected(found, kubeconfig, tracing), tracing)


if __name__ == "__main__":
    sys.exit(main())
