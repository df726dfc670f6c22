"""The local scaler: reads the metrics, decides as an HPA would, has replicas started and stopped, and traces every
decision."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from llmtrace.autoscale import hpa
from llmtrace.autoscale.complaints import Complaints
from llmtrace.autoscale.fleet import Fleet, Patience, Processes
from llmtrace.autoscale.prometheus import NoValueError, value_of
from llmtrace.autoscale.record import DecisionRecord, MetricRecord, ReplicaRecord, State
from llmtrace.autoscale.scaled_object import KIND, ScaledObject
from llmtrace.autoscale.sending import Sender
from llmtrace.endpoints_file import EndpointEntry
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing

CLOSE_S = 10.0
"""How long the end waits for traces that are being sent; those that are not yet are sent by the next scaler."""
MOST_KEPT = 1000
"""Decisions whose traces could not be sent yet; the oldest are given up first."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the scaler works with. ``window_s`` is how old the metrics' samples may be; ``settle_s`` how long after a
    decision its trace is sent at the earliest, so that the traces of the requests behind it are there; ``price`` is
    that of an accelerator for an hour."""

    scaled_object: ScaledObject
    replicas: list[EndpointEntry]
    endpoints: Path
    state: Path
    store: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    period_s: float = 15.0
    window_s: float = 10.0
    settle_s: float = 30.0
    accelerators: float = 1.0
    price: float = 0.0
    patience: Patience = field(default_factory=Patience)


class Metrics:
    """The scaler's own metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.current = Gauge(
            "llmtrace_autoscale_current_replicas", "Replicas that were asked for last.", registry=registry
        )
        self.ready = Gauge("llmtrace_autoscale_ready_replicas", "Replicas that can serve.", registry=registry)
        self.decisions = Counter(
            "llmtrace_autoscale_decisions_total", "Scaling decisions.", ["direction"], registry=registry
        )
        self.failures = Counter(
            "llmtrace_autoscale_failures_total",
            "Failures of what the scaler depends on.",
            ["part"],
            registry=registry,
        )


class Scaler:
    """A scaler from its options to its end."""

    def __init__(self, options: Options, processes: Processes, tracing: Tracing) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self._tell = Complaints(self.metrics.failures)
        self._traces = Sender(tracing, options.store, self._tell)
        self._options = options
        self._spec = options.scaled_object.hpa()
        self._triggers = options.scaled_object.triggers()
        self.fleet = Fleet(
            options.replicas, processes, options.endpoints, options.patience, self._save, self._supervisord_fails
        )
        if self._spec.maximum > self.fleet.size:
            raise UserError(
                f"maxReplicaCount is {self._spec.maximum}, and there are {self.fleet.size} replicas to start: "
                "lower it, or describe more"
            )
        self._lock = _lock(options.state)
        self.state = State.load(options.state)
        self._client = httpx.AsyncClient(trust_env=False)
        self._sender: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Scale until ``stop`` is set; raises UserError where the start fails."""
        try:
            server, _ = start_http_server(self._options.port, addr=self._options.host, registry=self.registry)
        except OSError as error:
            raise UserError(
                f"cannot listen on {self._options.host}:{self._options.port} ({error.strerror}): give another --port"
            ) from None
        try:
            await self.begin()
            while not stop.is_set():
                begun = time.monotonic()
                await self.tick()
                if self._sender is None or self._sender.done():
                    self._sender = asyncio.create_task(self.send())
                wait = max(self._options.period_s - (time.monotonic() - begun), 0.1)
                await _until(stop, wait)
        finally:
            await self.close()
            server.shutdown()

    async def close(self) -> None:
        """Leave everything as it is; a new scaler goes on with it."""
        if self._sender is not None:
            await asyncio.wait([self._sender], timeout=CLOSE_S)
        await self.fleet.close()
        await self._client.aclose()
        self._save()
        self._lock.close()

    async def begin(self) -> None:
        """Take over what runs and what an earlier scaler left open; start the first replicas, which is no decision."""
        while True:
            try:
                running = await self.fleet.adopt()
                break
            except UserError as error:
                self._supervisord_fails(str(error))
                await asyncio.sleep(self._options.patience.look_s)
        new = self.state.desired is None
        if self.state.desired is None:
            self.state.desired = min(max(len(running), self._spec.minimum), self._spec.maximum)
        for record in (r for d in self.state.decisions for r in d.replicas if r.outcome is None):
            if record.up:
                if any(p.name == a.READY_SPAN for p in record.phases):
                    self.fleet.serve(record.name)
                self.fleet.start(record)
            else:
                self.fleet.stop(record)
        busy = {r.name for d in self.state.decisions for r in d.replicas if r.outcome is None}
        for name in running:
            if name in busy:
                continue
            if await self.fleet.well(name):
                self.fleet.serve(name)
            else:
                self._begin(name)
        for name in self.fleet.spare(self.state.desired - len(self.fleet.active())) if new else []:
            self._begin(name)
        self.fleet.publish()
        self._save()

    def _begin(self, name: str) -> None:
        """Have a replica ready that no decision asked for; nothing is traced of it."""
        self.fleet.start(ReplicaRecord(name=name, up=True, started_ns=time.time_ns()))

    async def tick(self) -> None:
        """Look, decide, and apply the decision."""
        current = self.state.desired or 0
        values, failures = await self._values()
        verdict, history = hpa.decide(
            self._spec, self.state.history, time.time(), current, len(self.fleet.serving), values
        )
        self.state.history = history
        condition = _condition(self._spec, verdict, failures)
        if verdict.desired != current:
            self._decide(verdict, values, failures)
        elif condition != self.state.condition and (condition or self.state.condition != a.DOWN_STABILIZED):
            self._keep(self._record(verdict, values, failures, verdict.reason))
        self.state.condition = condition
        self._repair(verdict, values, failures)
        self.fleet.publish()
        self.metrics.current.set(self.state.desired or 0)
        self.metrics.ready.set(len(self.fleet.serving))
        self._save()

    async def send(self) -> None:
        """Send the traces of the decisions whose effect is known; one at a time calls this.

        What the collector does not take is sent again.
        """
        due = time.time_ns() - int(self._options.settle_s * 1e9)
        for decision in [d for d in self.state.decisions if not d.open and d.time_ns <= due]:
            if not await asyncio.to_thread(self._traces.send, decision):
                break
            self.state.decisions.remove(decision)
            self._save()
        for decision in self.state.decisions[:-MOST_KEPT]:
            if not decision.open:
                self.state.decisions.remove(decision)

    # Metrics.

    async def _values(self) -> tuple[dict[str, float], dict[str, str]]:
        """The metrics' values by trigger, and why the others have none."""

        async def ask(name: str) -> float | str:
            try:
                return await value_of(self._client, self._triggers[name].metadata)
            except NoValueError as error:
                return str(error)

        found = dict(zip(self._triggers, await asyncio.gather(*map(ask, self._triggers)), strict=True))
        failures = {name: said for name, said in found.items() if isinstance(said, str)}
        for said in failures.values():
            self._tell("prometheus", said)
        if not failures:
            self._tell("prometheus", "")
        return {name: value for name, value in found.items() if not isinstance(value, str)}, failures

    # Decisions.

    def _decide(self, verdict: hpa.Verdict, values: dict[str, float], failures: dict[str, str]) -> None:
        """Change the number of replicas. What is written down first is what a restart goes on with."""
        record = self._record(verdict, values, failures, verdict.reason)
        now = time.time_ns()
        missing = verdict.desired - len(self.fleet.active())
        if missing > 0:
            record.replicas = [ReplicaRecord(name=n, up=True, started_ns=now) for n in self.fleet.spare(missing)]
        elif missing < 0:
            record.replicas = [ReplicaRecord(name=n, up=False, started_ns=now) for n in self.fleet.surplus(-missing)]
        self.state.history = hpa.changed(self._spec, self.state.history, now / 1e9, verdict.current, verdict.desired)
        self.state.desired = verdict.desired
        self._keep(record)
        _log.info("%s: %d to %d replicas (%s)", record.id, verdict.current, verdict.desired, record.reason)
        self._apply(record.replicas)

    def _repair(self, verdict: hpa.Verdict, values: dict[str, float], failures: dict[str, str]) -> None:
        """Start what is missing, and stop what is too much, of the replicas that were asked for."""
        desired, active, now = self.state.desired or 0, self.fleet.active(), time.time_ns()
        if len(active) < desired:
            names, up = self.fleet.spare(desired - len(active)), True
        else:
            names, up = self.fleet.surplus(len(active) - desired), False
        if not names:
            return
        record = self._record(
            verdict, values, failures, f"{len(active)} of {desired} replicas run or are being started"
        )
        record.direction, record.current, record.desired = a.SCALE_HOLD, desired, desired
        record.replicas = [ReplicaRecord(name=name, up=up, started_ns=now) for name in names]
        self._keep(record)
        self._apply(record.replicas)

    def _apply(self, replicas: Iterable[ReplicaRecord]) -> None:
        for record in replicas:
            (self.fleet.start if record.up else self.fleet.stop)(record)

    def _keep(self, record: DecisionRecord) -> None:
        self.state.decisions.append(record)
        self.metrics.decisions.labels(record.direction).inc()
        self._save()

    def _record(
        self, verdict: hpa.Verdict, values: dict[str, float], failures: dict[str, str], reason: str
    ) -> DecisionRecord:
        now = time.time_ns()
        name = self._options.scaled_object.metadata.name
        change = verdict.desired - verdict.current
        return DecisionRecord(
            id=f"{name}-{now // 1000}",
            scaler_kind=KIND,
            scaler_name=name,
            time_ns=now,
            direction=a.SCALE_UP if change > 0 else a.SCALE_DOWN if change < 0 else a.SCALE_HOLD,
            reason=reason,
            metric=verdict.metric,
            metrics=[
                MetricRecord(
                    name=key,
                    query=trigger.metadata.query,
                    target=trigger.metadata.threshold,
                    target_type=trigger.metric_type,
                    value=values.get(key),
                    proposal=(verdict.proposals or {}).get(key),
                    failure=failures.get(key, ""),
                )
                for key, trigger in self._triggers.items()
            ],
            current=verdict.current,
            ready=len(self.fleet.serving),
            recommended=verdict.recommended,
            desired=verdict.desired,
            minimum=self._spec.minimum,
            maximum=self._spec.maximum,
            stabilization=verdict.stabilization,
            limit=verdict.limit,
            window_ms=self._options.window_s * 1e3,
            accelerators=self._options.accelerators,
            price_per_hour=self._options.price,
        )

    # Faults, and what is kept.

    def _supervisord_fails(self, said: str) -> None:
        self._tell("supervisord", said)

    def _save(self) -> None:
        try:
            self.state.save(self._options.state)
        except OSError as error:
            self._tell("state", f"{self._options.state} cannot be written ({error.strerror})")


def _condition(spec: hpa.Spec, verdict: hpa.Verdict, failures: dict[str, str]) -> str:
    """What keeps the number from being what the metrics ask for, where something does that may pass."""
    if failures:
        return "no value of " + ", ".join(sorted(failures))
    if verdict.limit in (hpa.Limit.MAXIMUM, hpa.Limit.UP, hpa.Limit.DOWN):
        return str(verdict.limit)
    # At the minimum nothing would be taken away anyway.
    moot = verdict.stabilization is hpa.Stabilization.DOWN and verdict.current <= spec.minimum
    return "" if moot or verdict.stabilization is hpa.Stabilization.READY else str(verdict.stabilization)


def _lock(state: Path) -> IO[bytes]:
    """Hold the state for one scaler alone; raises UserError where another has it."""
    path = state.with_suffix(".lock")
    try:
        file = path.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another scaler works with {state}: stop it, or give another --state") from None
    except OSError as error:
        raise UserError(f"the scaler's state {state} cannot be written ({error.strerror})") from None
    return file


async def _until(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass
