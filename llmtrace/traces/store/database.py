"""The DuckDB file: one thread writes, any thread reads.

Writes that wait are committed together, and a write is acknowledged when its commit is durable, so a process
that is killed loses no acknowledged span.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

from llmtrace.errors import UserError
from llmtrace.traces.otlp import attributes
from llmtrace.traces.store.batch import SCHEMA, Batch, serialize, table
from llmtrace.traces.store.plan import FALSE, Catalog, trace_where
from llmtrace.traces.store.retention import Retention, sweep

MAX_PENDING_BYTES = 32 * 2**20
"""Payload bytes that may wait for the writer before writes are refused."""
_GROUP_ROWS = 20_000
_SWEEP_S = 60
_SQL_TYPES = {
    pa.uint64(): "UBIGINT",
    pa.int64(): "BIGINT",
    pa.uint8(): "UTINYINT",
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.list_(pa.uint32()): "UINTEGER[]",
}

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The writer has too much to do; try again later."""


class Database:
    """The store's file at ``path``, made when missing.

    ``clock`` gives seconds since the Unix epoch; ``on_fatal`` is called when the database has become
    unusable.
    Raises UserError when the file cannot be opened: locked, corrupt, of another version, not writable.
    """

    def __init__(
        self,
        path: Path,
        retention: Retention | None = None,
        *,
        clock: Callable[[], float] = time.time,
        on_fatal: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self._retention = retention or Retention()
        self._clock = clock
        self.on_fatal = on_fatal
        self.failed = False
        self._connection = _open(path)
        self._cursors = threading.Lock()
        self._blobs: dict[int, bytes] = {}
        self.catalog = Catalog()
        self._learn(
            dict(self._pairs("SELECT id, message FROM resources")),
            {key: tuple(names) for key, names in self._pairs("SELECT id, names FROM shapes")},
        )
        self._queue: queue.SimpleQueue[tuple[Batch, Future[None]] | None] = queue.SimpleQueue()
        self._pending = 0
        self._pending_lock = threading.Lock()
        self._writer = threading.Thread(target=self._write_for_ever, name="writer", daemon=True)
        self._writer.start()

    def _pairs(self, sql: str) -> list[tuple[int, Any]]:
        return self._connection.execute(sql).fetchall()

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own, for one thread; close it after use."""
        with self._cursors:
            return self._connection.cursor()

    def serialized(self, rows: Iterable[tuple[int, bytes]]) -> bytes:
        """A serialized TracesData of rows (resource, payload)."""
        return serialize(rows, self._blobs)

    def trace(self, trace_id: str) -> bytes | None:
        """A trace as serialized TracesData, or None; the id is hexadecimal, of up to 32 digits."""
        where = trace_where(trace_id)
        if where is FALSE:
            return None
        with self.cursor() as cursor:
            rows = cursor.execute(
                f"SELECT resource, payload FROM spans WHERE {where.text}",  # noqa: S608
                where.parameters,
            ).fetchall()
        return self.serialized(rows) if rows else None

    def write(self, batch: Batch) -> Future[None]:
        """Queue a batch; the future is done when it is durable. QueueFullError when too much waits."""
        done: Future[None] = Future()
        size = batch.payload_bytes
        with self._pending_lock:
            if self.failed or (self._pending and self._pending + size > MAX_PENDING_BYTES):
                raise QueueFullError
            self._pending += size
        self._queue.put((batch, done))
        return done

    def close(self) -> None:
        """Write what waits, and close the file."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()
        self._connection.close()

    def _write_for_ever(self) -> None:
        next_sweep = time.monotonic() + 1
        while True:
            items = self._next_group(max(0.0, next_sweep - time.monotonic()))
            group = [item for item in items if item is not None]
            if group:
                self._commit(group)
            if len(group) < len(items):
                return
            if time.monotonic() >= next_sweep:
                self._sweep()
                next_sweep = time.monotonic() + _SWEEP_S

    def _next_group(self, timeout_s: float) -> list[tuple[Batch, Future[None]] | None]:
        try:
            items = [self._queue.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        rows = 0
        while items[-1] is not None and (rows := rows + len(items[-1][0])) < _GROUP_ROWS:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return items

    def _commit(self, group: list[tuple[Batch, Future[None]]]) -> None:
        batches = [batch for batch, _ in group]
        try:
            self._insert(batches)
            problem: Exception | None = None
        except Exception as error:
            log.error("cannot write %d spans: %s", sum(map(len, batches)), _first_line(error))  # noqa: TRY400
            problem = error
            self._note_fatal(error)
        with self._pending_lock:
            self._pending -= sum(batch.payload_bytes for batch in batches)
        for _, done in group:
            if not done.set_running_or_notify_cancel():
                continue
            if problem is None:
                done.set_result(None)
            else:
                done.set_exception(problem)

    def _insert(self, batches: list[Batch]) -> None:
        connection = self._connection
        resources = {k: v for batch in batches for k, v in batch.resources.items() if k not in self._blobs}
        shapes = {k: v for batch in batches for k, v in batch.shapes.items() if k not in self.catalog.shapes}
        known = self._blobs, self.catalog
        connection.begin()
        try:
            if resources:
                connection.executemany("INSERT INTO resources VALUES (?, ?)", list(resources.items()))
            if shapes:
                connection.executemany(
                    "INSERT INTO shapes VALUES (?, ?)", [(key, list(names)) for key, names in shapes.items()]
                )
            connection.register("arriving", table(batches, int(self._clock() * 1000)))
            connection.execute("INSERT INTO spans SELECT * FROM arriving")
            # Readers that see the spans must know their resources: before the commit, not after it.
            self._learn(resources, shapes)
            connection.commit()
        except BaseException:
            self._blobs, self.catalog = known
            connection.rollback()
            raise
        finally:
            connection.unregister("arriving")

    def _learn(self, blobs: dict[int, bytes], shapes: dict[int, tuple[str, ...]]) -> None:
        # Replaced, never changed: readers iterate over them in other threads.
        if not blobs and not shapes:
            return
        new = {key: pb.ResourceSpans.FromString(blob) for key, blob in blobs.items()}
        scopes = {key: message.scope_spans[0].scope.name for key, message in new.items()}
        known = self.catalog
        self._blobs = self._blobs | blobs
        self.catalog = Catalog(
            resources=dict(known.resources)
            | {key: attributes(message.resource.attributes) for key, message in new.items()},
            scopes=dict(known.scopes) | scopes,
            shapes=dict(known.shapes) | shapes,
        )

    def _sweep(self) -> None:
        try:
            try:
                deleted = sweep(self._connection, self.path, self._retention, int(self._clock() * 1000))
                if deleted:
                    log.info("deleted %d spans that are too old or too many", deleted)
            finally:
                # Even a sweep that broke off may have deleted resources: what is forgotten is written again.
                self._forget()
        except (duckdb.Error, OSError) as error:
            log.warning("cannot delete old traces now: %s", _first_line(error))
            self._note_fatal(error)

    def _forget(self) -> None:
        resources = {key for key, _ in self._pairs("SELECT id, NULL FROM resources")}
        shapes = {key for key, _ in self._pairs("SELECT id, NULL FROM shapes")}
        known = self.catalog
        self._blobs = {key: blob for key, blob in self._blobs.items() if key in resources}
        self.catalog = Catalog(
            resources={key: found for key, found in known.resources.items() if key in resources},
            scopes={key: name for key, name in known.scopes.items() if key in resources},
            shapes={key: names for key, names in known.shapes.items() if key in shapes},
        )

    def _note_fatal(self, error: Exception) -> None:
        if isinstance(error, duckdb.FatalException | duckdb.InternalException) and not self.failed:
            self.failed = True
            log.error("the database is unusable until the store is started again")
            self.on_fatal()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(path: Path) -> duckdb.DuckDBPyConnection:
    columns = ", ".join(f"{field.name} {_SQL_TYPES[field.type]}" for field in SCHEMA)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = duckdb.connect(str(path), config={"threads": min(4, os.cpu_count() or 1), "memory_limit": "1GB"})
        connection.execute("SET checkpoint_threshold = '64MB'")
        connection.execute("SET preserve_insertion_order = true")
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"CREATE TABLE IF NOT EXISTS spans ({columns})")
        connection.execute("CREATE TABLE IF NOT EXISTS resources (id UBIGINT, message BLOB)")
        connection.execute("CREATE TABLE IF NOT EXISTS shapes (id UBIGINT, names VARCHAR[])")
        found = [row[0] for row in connection.execute("DESCRIBE spans").fetchall()]
    except (duckdb.Error, OSError) as error:
        raise UserError(_cannot_open(path, error)) from None
    if found != SCHEMA.names:
        connection.close()
        raise UserError(f"{path} was written by another version of the store; move it away, or give another --db")
    return connection


def _cannot_open(path: Path, error: Exception) -> str:
    text = str(error)
    if "lock" in text.lower():
        return f"{path} is open in another process; stop that store, or give another --db"
    if isinstance(error, OSError) or "permission" in text.lower() or "cannot open file" in text.lower():
        return f"{path} cannot be opened for writing; check the directory's permissions, or give another --db"
    return f"{path} is no database of the store, or is damaged; move it away, or give another --db"
