"""The watcher: one leads, follows what the cluster tells, and sends a trace of each decision.

What is to be done follows from the objects as they are and from the state that is kept; it is done over again whenever
something was told, and every second. A decision is in the state before its trace is sent, and until the collector has
taken it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from llmtrace.autoscale.complaints import Complaints
from llmtrace.autoscale.kubernetes import scalers
from llmtrace.autoscale.kubernetes.api import FAULTS, Api, follow, said
from llmtrace.autoscale.kubernetes.cluster import HPAS, KINDS, SCALED_OBJECTS, VARIANTS, Cluster
from llmtrace.autoscale.kubernetes.leader import Lease
from llmtrace.autoscale.kubernetes.ledger import Ledger, Prices, Watched
from llmtrace.autoscale.kubernetes.objects import uid
from llmtrace.autoscale.kubernetes.progress import Patience, Progress
from llmtrace.autoscale.kubernetes.store import LostError, Store
from llmtrace.autoscale.sending import Sender
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing

LOOK_S = 1.0
"""How often to look at what changes with time alone."""
REST_S = 0.1
"""How long to collect changes before they are looked at."""
ASK_S = 5.0
"""How often the trace store is asked for first requests."""
AGAIN_S = 5.0
"""How long to wait after a failure before leading again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the watcher works with. ``namespace`` is the one that is watched, '' for all; ``home`` that of its Lease
    and its ConfigMap, both called ``name``; ``identity`` tells watchers apart."""

    namespace: str
    home: str
    identity: str
    name: str = "llmtrace-autoscale"
    store: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    lease_s: float = 15.0
    prices: Prices = field(default_factory=Prices)
    patience: Patience = field(default_factory=Patience)


class Metrics:
    """The watcher's own metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leads = Gauge("llmtrace_autoscale_leader", "1 where this watcher leads.", registry=registry)
        self.open = Gauge("llmtrace_autoscale_open_decisions", "Decisions not sent yet.", registry=registry)
        self.decisions = Counter(
            "llmtrace_autoscale_decisions_total", "Scaling decisions.", ["direction"], registry=registry
        )
        self.failures = Counter(
            "llmtrace_autoscale_failures_total", "Failures of what it depends on.", ["part"], registry=registry
        )
        self._asked = Gauge(
            "llmtrace_autoscale_current_replicas", "Replicas that were asked for last.", ["workload"], registry=registry
        )
        self._ready = Gauge(
            "llmtrace_autoscale_ready_replicas", "Replicas that can serve.", ["workload"], registry=registry
        )
        self._workloads: set[str] = set()

    def replicas(self, found: Mapping[str, tuple[int, int]]) -> None:
        """The replicas asked for and ready of every workload that is scaled; those of others are told no more."""
        for workload in self._workloads - found.keys():
            self._asked.remove(workload)
            self._ready.remove(workload)
        self._workloads = {*found}
        for workload, (asked, ready) in found.items():
            self._asked.labels(workload).set(asked)
            self._ready.labels(workload).set(ready)


class Watcher:
    """A watcher from its options to its end."""

    def __init__(self, options: Options, api: Api, tracing: Tracing) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self._options = options
        self._api = api
        self._tell = Complaints(self.metrics.failures)
        self._sender = Sender(tracing, options.store, self._tell)
        self._lease = Lease(api, options.home, options.name, options.identity, options.lease_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until ``stop`` is set; raises UserError where the start fails."""
        try:
            server, _ = start_http_server(self._options.port, addr=self._options.host, registry=self.registry)
        except OSError as error:
            raise UserError(
                f"cannot listen on {self._options.host}:{self._options.port} ({error.strerror}): give another --port"
            ) from None
        work = asyncio.create_task(self._work())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _end(work, stopped)
            await self._lease.release()
            await self._api.close()
            server.shutdown()

    async def _work(self) -> None:
        """Lead again and again; raises UserError where the state cannot be read."""
        while True:
            await self._lease.acquire()
            term = Term(self._options, self._api, self._lease, self._sender, self.metrics, self._tell)
            lead, hold = asyncio.create_task(term.run()), asyncio.create_task(self._lease.hold())
            self.metrics.leads.set(1)
            try:
                await asyncio.wait({lead, hold}, return_when=asyncio.FIRST_COMPLETED)
                if lead.done():
                    lead.result()
            except LostError:
                _log.warning("another watcher has written the state")
            except FAULTS as error:
                self._tell("state", said(error))
            finally:
                self.metrics.leads.set(0)
                await _end(lead, hold)
                self.metrics.replicas({})
            await asyncio.sleep(AGAIN_S)


class Term:
    """What one leader knows and does while it leads."""

    def __init__(
        self, options: Options, api: Api, lease: Lease, sender: Sender, metrics: Metrics, tell: Complaints
    ) -> None:
        self._options = options
        self._api = api
        self._lease = lease
        self._sender = sender
        self._metrics = metrics
        self._tell = tell
        self._store = Store(api, options.home, options.name)
        self.cluster = Cluster()
        self._progress = Progress(self.cluster, options.patience, store=bool(options.store))
        self._asked = 0.0

    async def run(self) -> None:
        """Lead until cancelled; raises LostError, UserError, and what the first reading of the state may raise."""
        self._ledger = Ledger(await self._store.load(), self._options.prices)
        sending: asyncio.Task[None] | None = None
        watches = [
            asyncio.create_task(follow(self._api, kind, self._options.namespace, self.cluster, self._tell))
            for kind in KINDS
        ]
        try:
            due = 0.0
            while True:
                await asyncio.sleep(REST_S)
                for watch in watches:
                    if watch.done():
                        watch.result()
                if not self.cluster.known or not (self.cluster.told() or time.monotonic() > due):
                    continue
                due = time.monotonic() + LOOK_S
                self.look(time.time_ns())
                await self._save()
                if sending is None or sending.done():
                    if sending is not None:
                        sending.result()
                    sending = asyncio.create_task(self._send())
        finally:
            await _end(*watches, *([sending] if sending else []))

    def look(self, now_ns: int) -> None:
        """Take up what was told, and bring every decision up to date."""
        ledger, cluster = self._ledger, self.cluster
        scaled, variants = cluster.every(SCALED_OBJECTS), cluster.every(VARIANTS)
        for version in cluster.versions():
            reading = scalers.read(version, scaled, variants)
            ready = cluster.ready(reading.target)
            self._count(ledger.take(reading, now_ns, ready, self._accelerators(reading.target)))
        for rescale in cluster.rescales():
            target = ledger.target(rescale.uid)
            if target is not None:
                self._count(ledger.take_event(rescale, now_ns, cluster.ready(target), self._accelerators(target)))
        decisions = sorted(ledger.state.decisions, key=lambda d: d.time_ns)
        taken = {pod if d.direction == a.SCALE_UP else f"-{pod}" for d in decisions for pods in d.uids for pod in pods}
        for decision in decisions:
            self._progress.follow(decision, taken, ledger.later(decision), now_ns)
        ledger.forget(now_ns, {uid(hpa) for hpa in cluster.every(HPAS)})
        self._metrics.open.set(len(ledger.state.decisions))
        targets = [scalers.target_of(hpa) for hpa in cluster.every(HPAS)]
        self._metrics.replicas(
            {f"{t.namespace}/{t.name}": (cluster.asked(t), cluster.ready(t)) for t in targets if cluster.workload(t)}
        )

    def _accelerators(self, target: scalers.Target) -> float:
        return self.cluster.accelerators(target, self._options.prices.accelerators)

    def _count(self, decision: Watched | None) -> None:
        if decision is None:
            return
        self._metrics.decisions.labels(decision.direction).inc()
        _log.info("%s: %d to %d replicas (%s)", decision.id, decision.current, decision.desired, decision.reason)

    async def _save(self) -> None:
        try:
            await self._store.save(self._ledger.state)
        except FAULTS as error:
            self._tell("state", said(error))
        else:
            self._tell("state", "")

    async def _send(self) -> None:
        """Ask for first requests, and send the traces of the decisions about which everything is known."""
        state = self._ledger.state
        if self._options.store and time.monotonic() - self._asked > ASK_S:
            self._asked = time.monotonic()
            for record in [r for d in state.decisions for r in d.replicas if self._progress.waits_for_request(r)]:
                first_ns = await asyncio.to_thread(
                    self._sender.first_token, record, self._options.patience.first_request_s
                )
                if first_ns is not None and self._progress.waits_for_request(record):
                    self._progress.served(record, first_ns)
        now = time.time_ns()
        for decision in [d for d in state.decisions if self._progress.done(d, self._ledger.later(d), now)]:
            if not self._store.holds(decision.id):
                continue
            if not self._lease.held or not await asyncio.to_thread(self._sender.send, decision):
                return
            state.decisions.remove(decision)
            await self._save()


async def _end(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
