"""Searches: candidates by SQL, newest first, then the exact answer on the spans themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import duckdb
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

from llmtrace.traces import otlp
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.database import Database
from llmtrace.traces.store.evaluate import NO_ROOT, TraceFacts, facts, holds, select, values
from llmtrace.traces.store.plan import Catalog, Sql, join, spans_where, traces_where

_FIRST_CANDIDATES = 4_000
_MAX_CANDIDATES = 200_000
_TRACES_AT_A_TIME = 200
_RECENT_SPANS = 20_000
"""Spans that are looked at for the values of an attribute."""

_WITHOUT_VALUES = frozenset({"duration", "traceDuration", "trace:id", "span:id", "span:parentID"})
_OF_ROOT = {"rootName": q.Field("intrinsic", "name"), "rootServiceName": q.Field("resource", "service.name")}

Key = tuple[int, int]


@dataclass(slots=True)
class Found:
    """A trace that matches. Times in nanoseconds; ``spans`` are those that match, newest first."""

    trace_id: str
    spans: list[Span] = field(default_factory=list)
    root_name: str = NO_ROOT
    root_service: str = NO_ROOT
    start_ns: int = 0
    end_ns: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """A range of time in nanoseconds since the Unix epoch, both ends included."""

    start_ns: int = 0
    end_ns: int = 2**63 - 1

    def where(self) -> Sql:
        """A condition that is true of spans that overlap the range."""
        parts = []
        if self.start_ns > 0:
            parts.append(Sql("end_ns >= ?", (self.start_ns,)))
        if self.end_ns < 2**63 - 1:
            parts.append(Sql("start_ns <= ?", (self.end_ns,)))
        return join("AND", parts)


def search(database: Database, query: q.Query, window: Window, limit: int) -> list[Found]:
    """Up to ``limit`` traces that match, newest first."""
    with database.cursor() as cursor:
        whole = isinstance(query, q.Join) or _needs_trace(query.condition)
        by_trace = _by_trace if whole else _by_span
        found = by_trace(database, cursor, query, window, limit)
        _describe(database, cursor, found)
    return sorted(found.values(), key=lambda one: one.start_ns, reverse=True)


def _needs_trace(condition: q.Condition) -> bool:
    match condition:
        case q.And(parts=parts) | q.Or(parts=parts):
            return any(_needs_trace(part) for part in parts)
        case q.Not(part=part):
            return _needs_trace(part)
        case q.Truth(operand=operand):
            return _of_trace(operand)
        case q.Comparison(left=left, right=right):
            return _of_trace(left) or _of_trace(right)


def _of_trace(operand: q.Operand) -> bool:
    return isinstance(operand, q.Field) and operand.scope == "intrinsic" and operand.name in q.OF_TRACE


def _candidates(
    cursor: duckdb.DuckDBPyConnection, where: Sql, count: int
) -> tuple[list[tuple[int, int, int, bytes]], bool]:
    """Rows (trace_high, trace_low, resource, payload) of the newest spans, and whether these are all."""
    # Two passes: the first reads only narrow columns, the second only the payloads that are needed.
    row = cursor.execute(
        f"SELECT min(start_ns), count(*) FROM (SELECT start_ns FROM spans WHERE {where.text}"  # noqa: S608
        f" ORDER BY start_ns DESC LIMIT {count})",
        where.parameters,
    ).fetchone()
    if row is None or not row[1]:
        return [], True
    rows = cursor.execute(
        f"SELECT trace_high, trace_low, resource, payload FROM spans WHERE start_ns >= ? AND ({where.text})"  # noqa: S608
        f" ORDER BY start_ns DESC LIMIT {count}",
        (row[0], *where.parameters),
    ).fetchall()
    return rows, row[1] < count


def _by_span(
    database: Database,
    cursor: duckdb.DuckDBPyConnection,
    query: q.Query,
    window: Window,
    limit: int,
) -> dict[Key, Found]:
    assert isinstance(query, q.Spanset)  # noqa: S101
    catalog = database.catalog
    where = join("AND", (window.where(), spans_where(query.condition, catalog)))
    count = max(_FIRST_CANDIDATES, limit * 4)
    while True:
        rows, complete = _candidates(cursor, where, count)
        catalog = database.catalog  # again: spans may have come whose resources were unknown before
        found: dict[Key, Found] = {}
        for high, low, resource, payload in dict.fromkeys(rows):
            if len(found) >= limit and (high, low) not in found:
                continue
            span = _decoded(catalog, resource, payload)
            if holds(query.condition, span, TraceFacts()):
                one = found.setdefault((high, low), Found(span.trace_id))
                one.spans.append(span)
        if complete or len(found) >= limit or count >= _MAX_CANDIDATES:
            return found
        count = min(count * 8, _MAX_CANDIDATES)


def _by_trace(
    database: Database,
    cursor: duckdb.DuckDBPyConnection,
    query: q.Query,
    window: Window,
    limit: int,
) -> dict[Key, Found]:
    where = join("AND", (window.where(), traces_where(query, database.catalog)))
    keys: list[Key] = cursor.execute(
        f"SELECT trace_high, trace_low FROM spans WHERE {where.text}"  # noqa: S608
        f" GROUP BY ALL ORDER BY max(start_ns) DESC LIMIT {_MAX_CANDIDATES // 10}",
        where.parameters,
    ).fetchall()
    found: dict[Key, Found] = {}
    for at in range(0, len(keys), _TRACES_AT_A_TIME):
        for key, trace in _load(database, cursor, keys[at : at + _TRACES_AT_A_TIME]):
            selected = select(query, trace, facts(trace))
            if selected:
                found[key] = Found(trace.trace_id, selected[::-1])
            if len(found) >= limit:
                return found
    return found


def _load(database: Database, cursor: duckdb.DuckDBPyConnection, keys: list[Key]) -> Iterator[tuple[Key, Trace]]:
    rows = cursor.execute(
        "SELECT trace_high, trace_low, resource, payload FROM spans JOIN"
        " (SELECT unnest(?::UBIGINT[]) AS trace_high, unnest(?::UBIGINT[]) AS trace_low)"
        " USING (trace_high, trace_low)",
        [[key[0] for key in keys], [key[1] for key in keys]],
    ).fetchall()
    groups: dict[Key, list[tuple[int, bytes]]] = {key: [] for key in keys}
    for high, low, resource, payload in rows:
        groups[high, low].append((resource, payload))
    for (high, low), group in groups.items():
        trace = otlp.decode_trace(f"{high:016x}{low:016x}", database.serialized(group))
        if trace is not None:
            yield (high, low), trace


def _describe(database: Database, cursor: duckdb.DuckDBPyConnection, found: dict[Key, Found]) -> None:
    """Fill in the times and the root of each trace."""
    if not found:
        return
    rows = cursor.execute(
        "SELECT trace_high, trace_low, min(start_ns), max(end_ns),"
        " arg_min(name, start_ns) FILTER (parent_id = 0),"
        " arg_min(resource, start_ns) FILTER (parent_id = 0)"
        " FROM spans JOIN (SELECT unnest(?::UBIGINT[]) AS trace_high, unnest(?::UBIGINT[]) AS trace_low)"
        " USING (trace_high, trace_low) GROUP BY trace_high, trace_low",
        [[key[0] for key in found], [key[1] for key in found]],
    ).fetchall()
    resources = database.catalog.resources
    for high, low, start_ns, end_ns, root_name, root_resource in rows:
        one = found[high, low]
        one.start_ns, one.end_ns = start_ns, end_ns
        if root_resource is not None:
            one.root_name = root_name
            service = resources.get(root_resource, {}).get("service.name")
            one.root_service = service if isinstance(service, str) else ""


def tag_names(database: Database) -> tuple[list[str], list[str]]:
    """The names of all attributes of spans, and of resources, sorted."""
    catalog = database.catalog
    of_spans = {name for names in catalog.shapes.values() for name in names}
    of_resources = {name for attributes in catalog.resources.values() for name in attributes}
    return sorted(of_spans), sorted(of_resources)


def tag_values(database: Database, tag: q.Field, query: q.Query, window: Window) -> list[object]:
    """Distinct values of an attribute or intrinsic among the newest spans that match the query, sorted."""
    catalog = database.catalog
    parts = [window.where(), traces_where(query, catalog)]
    if tag.scope == "intrinsic" and tag.name in _WITHOUT_VALUES:
        return []
    if tag.scope == "intrinsic" and tag.name in _OF_ROOT:
        tag = _OF_ROOT[tag.name]
        parts.append(Sql("parent_id = 0"))
    condition: q.Condition = q.And(())
    if isinstance(query, q.Spanset):
        condition = query.condition
        parts[1] = spans_where(condition, catalog)
    if tag.scope != "intrinsic":
        present = q.Comparison(tag, "!=", q.Constant(None))
        parts.append(spans_where(present, catalog))
    with database.cursor() as cursor:
        rows, _ = _candidates(cursor, join("AND", parts), _RECENT_SPANS)
    spans = (_decoded(catalog, resource, payload) for _, _, resource, payload in rows)
    loose = _needs_trace(condition)  # its SQL alone decides, so that no whole trace is read for a suggestion
    return _distinct(tag, (s for s in spans if loose or holds(condition, s, TraceFacts())))


def _decoded(catalog: Catalog, resource: int, payload: bytes) -> Span:
    return otlp.span(pb.Span.FromString(payload), catalog.resources.get(resource, {}), catalog.scopes.get(resource, ""))


def _distinct(tag: q.Field, spans: Iterable[Span]) -> list[object]:
    found = {(type(value).__name__, str(value)): value for s in spans for value in values(tag, s, TraceFacts())}
    return [found[key] for key in sorted(found)]
