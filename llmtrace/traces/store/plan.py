"""Turns TraceQL conditions into SQL over the table ``spans``.

The SQL selects at least the spans that match; ``evaluate`` then decides on the spans themselves. Conditions
on resources are decided here, because there are few resources and all are in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmtrace.traces.model import Attributes
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.batch import term, trace_key
from llmtrace.traces.store.evaluate import compare, plain

_FLIPPED = {">": "<", "<": ">", ">=": "<=", "<=": ">="}
_MAX_EXACT_INT = 2**53


@dataclass(frozen=True, slots=True)
class Catalog:
    """What is in memory, by hash: each resource's attributes and scope name, each shape's attribute names."""

    resources: Mapping[int, Attributes] = field(default_factory=dict)
    scopes: Mapping[int, str] = field(default_factory=dict)
    shapes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sql:
    """A condition of a WHERE clause, and the values of its parameters in order."""

    text: str
    parameters: tuple[object, ...] = ()


TRUE, FALSE = Sql("true"), Sql("false")


def join(op: str, parts: Iterable[Sql]) -> Sql:
    """Conditions joined by AND or OR."""
    kept = list(parts)
    neutral, absorbing = (TRUE, FALSE) if op == "AND" else (FALSE, TRUE)
    if absorbing in kept:
        return absorbing
    kept = [part for part in kept if part != neutral]
    if not kept:
        return neutral
    text = f" {op} ".join(f"({part.text})" for part in kept)
    return Sql(text, tuple(parameter for part in kept for parameter in part.parameters))


def spans_where(condition: q.Condition, catalog: Catalog) -> Sql:
    """A condition that is true of every span that matches."""
    match condition:
        case q.And(parts=parts):
            return join("AND", (spans_where(part, catalog) for part in parts))
        case q.Or(parts=parts):
            return join("OR", (spans_where(part, catalog) for part in parts))
        case q.Truth(operand=q.Field() as operand):
            return _attribute(operand, "=", True, catalog)
        case q.Truth(operand=q.Constant(value=value)):
            return TRUE if value is True else FALSE
        case q.Comparison(left=q.Field() as left, op=op, right=q.Constant(value=value)):
            return _comparison(left, op, value, catalog)
        case q.Comparison(left=q.Constant(value=value), op=op, right=q.Field() as right):
            return _comparison(right, _FLIPPED.get(op, op), value, catalog)
    return TRUE


def traces_where(query: q.Query, catalog: Catalog) -> Sql:
    """A condition that is true of every span of every trace that matches."""
    if isinstance(query, q.Join):
        op = "OR" if query.op == "||" else "AND"
        return join(op, (traces_where(query.left, catalog), traces_where(query.right, catalog)))
    return _of_trace(spans_where(query.condition, catalog))


def _of_trace(where: Sql) -> Sql:
    if where in (TRUE, FALSE):
        return where
    text = f"(trace_high, trace_low) IN (SELECT (trace_high, trace_low) FROM spans WHERE {where.text})"  # noqa: S608
    return Sql(text, where.parameters)


def _comparison(operand: q.Field, op: str, value: q.Scalar, catalog: Catalog) -> Sql:
    if operand.scope == "intrinsic":
        return _intrinsic(operand.name, op, value, catalog)
    return _attribute(operand, op, value, catalog)


def _attribute(operand: q.Field, op: str, value: q.Scalar, catalog: Catalog) -> Sql:
    if value is None and op == "=":
        return TRUE
    of_span = FALSE if operand.scope == "resource" else _span_attribute(operand.name, op, value, catalog)
    of_resource = FALSE if operand.scope == "span" else _resource(operand.name, op, value, catalog)
    return join("OR", (of_span, of_resource))


def _span_attribute(name: str, op: str, value: q.Scalar, catalog: Catalog) -> Sql:
    large = isinstance(value, int) and abs(value) > _MAX_EXACT_INT
    if op == "=" and isinstance(value, str | bool | int | float) and not large:
        return Sql("list_contains(terms, ?::UINTEGER)", (term(name, value),))
    return _among("shape", [key for key, names in catalog.shapes.items() if name in names])


def _resource(name: str, op: str, value: q.Scalar, catalog: Catalog) -> Sql:
    found = [key for key, attributes in catalog.resources.items() if compare(plain(attributes.get(name)), op, (value,))]
    return _among("resource", found)


def _among(column: str, keys: list[int]) -> Sql:
    if not keys:
        return FALSE
    return Sql(f"{column} IN (SELECT unnest(?::UBIGINT[]))", (keys,))


def _intrinsic(name: str, op: str, value: q.Scalar, catalog: Catalog) -> Sql:
    if name == "name" and isinstance(value, str):
        return _text("name", op, value)
    if name in ("kind", "status") and isinstance(value, q.Word) and op in ("=", "!="):
        names = q.KINDS if name == "kind" else q.STATUSES
        number = names.index(value.text) if value.text in names else -1
        if number == 0:  # stands also for the numbers of a later OTLP
            return Sql(f"{name} {op} 0 OR {name} >= {len(names)}")
        if number < 0:
            return FALSE if op == "=" else TRUE
        return Sql(f"{name} {op} ?", (number,))
    if name == "duration" and isinstance(value, q.Duration) and op in ("=", "!=", ">", ">=", "<", "<="):
        return Sql(f"greatest(0, end_ns - start_ns)::DOUBLE {op} ?", (value.ns,))
    if name == "trace:id" and op == "=" and isinstance(value, str):
        return trace_where(value)
    if name == "span:id" and op == "=" and isinstance(value, str):
        return _span_id(value)
    if name == "rootName" and isinstance(value, str) and op == "=":
        return _of_trace(Sql("parent_id = 0 AND name = ?", (value,)))
    if name == "rootServiceName" and isinstance(value, str) and op == "=":
        return _of_trace(join("AND", (Sql("parent_id = 0"), _resource("service.name", op, value, catalog))))
    return TRUE


def _text(column: str, op: str, value: str) -> Sql:
    if op == "=~":
        return Sql(f"regexp_full_match({column}, ?, 's')", (value,))
    if op == "!~":
        return Sql(f"NOT regexp_full_match({column}, ?, 's')", (value,))
    return Sql(f"{column} {op} ?", (value,))


def trace_where(trace_id: str) -> Sql:
    """A condition that is true of the spans of the trace with a hexadecimal id of up to 32 digits."""
    try:
        high, low = trace_key(bytes.fromhex(trace_id.rjust(32, "0")))
    except (ValueError, struct.error):
        return FALSE
    return Sql("trace_high = ? AND trace_low = ?", (high, low))


def _span_id(span_id: str) -> Sql:
    try:
        number = int(span_id, 16)
    except ValueError:
        return FALSE
    return Sql("span_id = ?", (number,)) if 0 < number < 2**64 else FALSE
