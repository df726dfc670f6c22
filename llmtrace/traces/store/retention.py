"""Deletes the oldest traces, by age and by size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

MIN_MAX_BYTES = 256 * 2**20
"""DuckDB frees space in pieces of some 100 MB (row groups), so a smaller limit cannot be kept."""
_SLACK = 0.01
_KEPT = 0.85
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Retention:
    """How long traces are kept, in hours since they were received, and how many bytes they may take."""

    hours: float = 168
    max_bytes: int = 2 * 2**30


def used_bytes(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """Bytes in use: the file's blocks that are not free (those are filled first), and the log beside it."""
    row = connection.execute("SELECT block_size * used_blocks FROM pragma_database_size()").fetchone()
    log = path.with_name(path.name + ".wal")
    return int(row[0] if row else 0) + (log.stat().st_size if log.exists() else 0)


def sweep(connection: duckdb.DuckDBPyConnection, path: Path, retention: Retention, now_ms: int) -> int:
    """Delete what is too old or too much; returns how many spans were deleted.

    A trace goes as a whole, and goes when its latest span is too old. Within three rounds of a sweep by size,
    traces that keep growing may lose their oldest spans, so that the size is bounded at all events.
    """
    deleted = 0
    age_ms = int(retention.hours * 3_600_000)
    oldest = connection.execute("SELECT min(received_ms) FROM spans").fetchone()
    if oldest and oldest[0] is not None and oldest[0] < now_ms - age_ms * (1 + _SLACK):
        deleted += delete_until(connection, now_ms - age_ms - 1)
        connection.execute("CHECKPOINT")
    for attempt in range(_ROUNDS):
        used = used_bytes(connection, path)
        if used <= retention.max_bytes:
            break
        share = 1 - _KEPT * retention.max_bytes / used
        cutoff = connection.execute("SELECT quantile_disc(received_ms, ?) FROM spans", [share]).fetchone()
        if not cutoff or cutoff[0] is None:
            break
        deleted += delete_until(connection, cutoff[0], whole=attempt < _ROUNDS - 1)
        connection.execute("CHECKPOINT")
    if deleted:
        _forget(connection)
    return deleted


def delete_until(connection: duckdb.DuckDBPyConnection, cutoff_ms: int, *, whole: bool = True) -> int:
    """Delete the traces (``whole``), or the spans, of which nothing was received after ``cutoff_ms``."""
    condition = "received_ms <= ?"
    parameters = [cutoff_ms]
    if whole:
        condition += (
            " AND (trace_high, trace_low) NOT IN (SELECT (trace_high, trace_low) FROM spans WHERE received_ms > ?)"
        )
        parameters.append(cutoff_ms)
    row = connection.execute(f"DELETE FROM spans WHERE {condition}", parameters).fetchone()  # noqa: S608
    return int(row[0]) if row else 0


def _forget(connection: duckdb.DuckDBPyConnection) -> None:
    for table, column in (("resources", "resource"), ("shapes", "shape")):
        connection.execute(
            f"DELETE FROM {table} WHERE id NOT IN (SELECT DISTINCT {column} FROM spans)"  # noqa: S608
        )
