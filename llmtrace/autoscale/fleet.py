"""The replicas of a local stack: starts them by supervisord, drains and stops them, and tells the picker.

Each start and stop goes on in a task of its own and writes what it finds into a record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from llmtrace.autoscale.record import ReplicaRecord, write_atomically
from llmtrace.autoscale.replica import Probe, StartLog
from llmtrace.deploy.supervisor import DOWN, Process
from llmtrace.endpoints_file import EndpointEntry, parse, read
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a

MOST_RESTARTS = 3
"""A process that ended so often while it started is given up."""

_log = logging.getLogger(__name__)


class Processes(Protocol):
    """What starts and stops replicas by name; every method may raise UserError, and blocks."""

    def processes(self) -> list[Process]:
        """All processes."""

    def process(self, name: str) -> Process:
        """One of them."""

    def start(self, name: str) -> None:
        """Start it, if it does not run."""

    def stop(self, name: str) -> None:
        """Stop it, if it runs, and wait for its end."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds: for a replica to become ready; for its first request; for the requests of one
    that goes; for pickers to notice that it goes; before a failed start is repeated; between two looks."""

    ready_s: float = 300.0
    first_request_s: float = 60.0
    drain_s: float = 60.0
    notice_s: float = 2.0
    retry_s: float = 60.0
    look_s: float = 0.5


class _StartError(Exception):
    """A replica cannot become ready."""


@dataclass(frozen=True)
class _Work:
    """A start or a stop that goes on."""

    record: ReplicaRecord
    task: asyncio.Task[None]


class Fleet:
    """All replicas that there may be, in the order in which they are started.

    ``changed`` is called whenever a record was written to; ``complain`` when supervisord could not be reached.
    """

    def __init__(
        self,
        replicas: Sequence[EndpointEntry],
        processes: Processes,
        endpoints: Path,
        patience: Patience,
        changed: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self.serving: set[str] = set()
        self._replicas = {entry.name: entry for entry in replicas}
        self._processes = processes
        self._endpoints = endpoints
        self._patience = patience
        self._changed = changed
        self._complain = complain
        self._probe = Probe()
        self._starts: dict[str, _Work] = {}
        self._stops: dict[str, _Work] = {}
        self._failed_at: dict[str, float] = {}

    async def adopt(self) -> list[str]:
        """Take over what runs; returns the names of the replicas whose process does. Raises UserError."""
        states = {p.name: p.state for p in await asyncio.to_thread(self._processes.processes)}
        if unknown := [name for name in self._replicas if name not in states]:
            raise UserError(f"supervisord knows no process {unknown[0]}: run `llmtrace up`")
        return [name for name in self._replicas if states[name] not in DOWN]

    async def close(self) -> None:
        """Leave everything as it is: what was begun goes on after a restart."""
        tasks = [work.task for work in (*self._starts.values(), *self._stops.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._probe.close()

    @property
    def size(self) -> int:
        """The most replicas that there can be."""
        return len(self._replicas)

    def active(self) -> list[str]:
        """The replicas that serve or are being started, in order."""
        return [n for n in self._replicas if n not in self._stops and (n in self.serving or n in self._starts)]

    def spare(self, count: int) -> list[str]:
        """Up to ``count`` replicas that can be started now.

        None that failed a moment ago, one that is being stopped last.
        """
        active, now = set(self.active()), time.monotonic()
        rested = [
            name
            for name in self._replicas
            if name not in active and now - self._failed_at.get(name, -1e9) >= self._patience.retry_s
        ]
        return sorted(rested, key=lambda name: name in self._stops)[: max(count, 0)]

    def surplus(self, count: int) -> list[str]:
        """The ``count`` replicas to take away first: those that do not serve yet, then from the end."""
        order = self.active()
        return sorted(order, key=lambda name: (name in self.serving, -order.index(name)))[:count]

    def publish(self) -> None:
        """Write the picker's endpoints file, if it says something else."""
        wanted = [entry for name, entry in self._replicas.items() if name in self.serving]
        try:
            if parse(read(self._endpoints), self._endpoints) == wanted:
                return
        except UserError:
            pass  # It is written anew.
        content = yaml.safe_dump({"endpoints": [entry.model_dump() for entry in wanted]}, sort_keys=False)
        try:
            write_atomically(self._endpoints, content)
        except OSError as error:
            _log.error("the endpoints file %s cannot be written (%s)", self._endpoints, error.strerror)

    async def well(self, name: str) -> bool:
        """Whether the replica says that it can serve."""
        return await self._probe.well(self._url(name))

    def serve(self, name: str) -> None:
        """The replica serves already."""
        self.serving.add(name)

    def start(self, record: ReplicaRecord) -> None:
        """Start a replica, or go on with its start."""
        task = asyncio.create_task(self._run(record, self._start(record), self._starts))
        self._starts[record.name] = _Work(record, task)

    def stop(self, record: ReplicaRecord) -> None:
        """Drain a replica and stop it, or go on with that."""
        before = self._starts.pop(record.name, None)
        if before is not None:
            before.task.cancel()
            if before.record.outcome is None:
                if not before.record.phases:
                    before.record.phase(a.CONTAINER_START_SPAN, time.time_ns(), a.SOURCE_PROBE)
                ready = record.name in self.serving
                before.record.end(a.OUTCOME_UNUSED if ready else a.OUTCOME_WITHDRAWN, time.time_ns())
        task = asyncio.create_task(self._run(record, self._stop(record), self._stops))
        self._stops[record.name] = _Work(record, task)

    async def _run(self, record: ReplicaRecord, work: Coroutine[Any, Any, None], book: dict[str, _Work]) -> None:
        try:
            await work
        except Exception as error:
            _log.exception("%s: its start or stop failed", record.name)
            record.end(a.OUTCOME_FAILED, time.time_ns(), type(error).__name__)
        entry = book.get(record.name)
        if entry is not None and entry.record is record:
            del book[record.name]
        self._changed()

    # A start.

    async def _start(self, record: ReplicaRecord) -> None:
        name = record.name
        if name in self._stops:
            await asyncio.wait([self._stops[name].task])
        self._failed_at.pop(name, None)
        try:
            await self._become_ready(record)
        except _StartError as error:
            self._failed_at[name] = time.monotonic()
            if not record.phases:
                record.phase(a.CONTAINER_START_SPAN, time.time_ns(), a.SOURCE_PROBE)
            record.end(a.OUTCOME_FAILED, time.time_ns(), str(error))
            _log.warning("%s never became ready: %s", name, error)
            await self._stop_process(name)
            return
        await self._first_request(record)

    async def _become_ready(self, record: ReplicaRecord) -> None:
        """Start the process and follow it until it serves; raises _StartError."""
        url, look = self._url(record.name), self._patience.look_s
        deadline = record.started_ns / 1e9 + self._patience.ready_s
        log: StartLog | None = None
        ordered, pids = False, set[int]()
        while not (ordered and await self._probe.well(url)):
            if time.time() > deadline:
                said = f"; its log says: {log.error}" if log and log.error else ""
                raise _StartError(f"not ready within {self._patience.ready_s:g} s{said}")
            try:
                process = await asyncio.to_thread(self._processes.process, record.name)
                if log is None:
                    log = StartLog(process.log)
                if not ordered:
                    await asyncio.to_thread(self._processes.start, record.name)
                    ordered = True
                    continue
                self._check(process, pids, log)
            except UserError as error:
                self._complain(str(error))
            else:
                self._look(record, log)
            await asyncio.sleep(look)
        if log is not None:
            self._look(record, log)
        now = time.time_ns()
        if not record.phases:
            record.phase(a.CONTAINER_START_SPAN, now, a.SOURCE_PROBE)
        self.serving.add(record.name)
        self.publish()
        record.phase(a.READY_SPAN, time.time_ns(), a.SOURCE_PROBE)
        self._changed()

    @staticmethod
    def _check(process: Process, pids: set[int], log: StartLog) -> None:
        """Raise _StartError where the process will not come up."""
        if process.pid:
            pids.add(process.pid)
        ended = "FATAL" if process.state == "FATAL" else f"{MOST_RESTARTS} times" if len(pids) > MOST_RESTARTS else ""
        if ended:
            log.read()
            said = f"; its log says: {log.error}" if log.error else ""
            raise _StartError(f"the process ended: {ended}{said}")

    def _look(self, record: ReplicaRecord, log: StartLog) -> None:
        """Take up what the log shows."""
        log.read()
        names = {p.name for p in record.phases}
        for name, shown in ((a.CONTAINER_START_SPAN, log.loading or log.loaded), (a.MODEL_LOAD_SPAN, log.loaded)):
            if shown and name not in names:
                record.phase(name, time.time_ns(), a.SOURCE_LOG)
                self._changed()

    async def _first_request(self, record: ReplicaRecord) -> None:
        """Follow a replica that serves until it gives a token."""
        deadline = time.monotonic() + self._patience.first_request_s
        while time.monotonic() < deadline:
            if await self._probe.generated(self._url(record.name)) > 0:
                record.phase(a.FIRST_REQUEST_SPAN, time.time_ns(), a.SOURCE_PROBE)
                record.end(a.OUTCOME_SERVED, time.time_ns())
                return
            await asyncio.sleep(self._patience.look_s)
        record.end(a.OUTCOME_UNUSED, time.time_ns())

    # A stop.

    async def _stop(self, record: ReplicaRecord) -> None:
        name, url = record.name, self._url(record.name)
        served = name in self.serving
        self.serving.discard(name)
        self.publish()
        if record.running is None:
            record.running = await self._probe.requests(url)
        if served or record.running:
            await asyncio.sleep(self._patience.notice_s)
            record.cut = await self._drained(url)
        await self._stop_process(name)
        record.phase(a.DRAIN_SPAN, time.time_ns(), a.SOURCE_PROBE)
        record.end(a.OUTCOME_CUT if record.cut else a.OUTCOME_DRAINED, time.time_ns())

    async def _drained(self, url: str) -> int | None:
        """Wait until the replica has no requests, or the time is up.

        Returns those that are left, None if it is silent.
        """
        deadline = time.monotonic() + self._patience.drain_s
        while True:
            left = await self._probe.requests(url)
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(self._patience.look_s)

    async def _stop_process(self, name: str) -> None:
        """Stop the process; a supervisord that does not answer is asked again."""
        while True:
            try:
                await asyncio.to_thread(self._processes.stop, name)
            except UserError as error:
                self._complain(str(error))
                await asyncio.sleep(self._patience.look_s * 4)
            else:
                return

    def _url(self, name: str) -> str:
        entry = self._replicas[name]
        return f"http://{entry.address}:{entry.port}"
