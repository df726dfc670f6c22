"""What a TraceQL query says of spans: the exact answer, on decoded spans."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llmtrace.traces.model import AttributeValue, Span, Trace
from llmtrace.traces.store import traceql as q

NO_ROOT = "<root span not yet received>"
"""What Tempo says in place of the root's names while a trace has no root span."""

_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_matches = lru_cache(maxsize=8192)(q.matches)


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What intrinsics of the trace refer to; the duration in nanoseconds."""

    root_name: str = NO_ROOT
    root_service: str = NO_ROOT
    duration_ns: int = 0


def facts(trace: Trace) -> TraceFacts:
    """The facts of a whole trace."""
    root = trace.roots[0] if trace.roots else None
    start = min(span.start_ns for span in trace.spans)
    return TraceFacts(
        root_name=root.name if root else NO_ROOT,
        root_service=root.service if root else NO_ROOT,
        duration_ns=max(0, max(span.end_ns for span in trace.spans) - start),
    )


def holds(condition: q.Condition, span: Span, of_trace: TraceFacts) -> bool:
    """Whether a span matches a condition."""
    match condition:
        case q.And(parts=parts):
            return all(holds(part, span, of_trace) for part in parts)
        case q.Or(parts=parts):
            return any(holds(part, span, of_trace) for part in parts)
        case q.Not(part=part):
            return not holds(part, span, of_trace)
        case q.Truth(operand=operand):
            return any(value is True for value in values(operand, span, of_trace))
        case q.Comparison(left=left, op=op, right=right):
            return compare(values(left, span, of_trace), op, values(right, span, of_trace))


def compare(left: Sequence[object], op: str, right: Sequence[object]) -> bool:
    """Compare two operands, each given as its values: none when absent, several when it is an array.

    An array matches when one of its values does; nothing compares with an absent one but ``nil``, and values
    of different types never compare.
    """
    if None in right or None in left:
        absent = not left or not right
        return (op == "=" and absent) or (op == "!=" and not absent)
    if op in ("!=", "!~") and left and right:
        positive = "=" if op == "!=" else "=~"
        comparable = any(_kind(a) == _kind(b) for a in left for b in right)
        return comparable and not any(_one(a, positive, b) for a in left for b in right)
    return any(_one(a, op, b) for a in left for b in right)


def _kind(value: object) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _one(left: object, op: str, right: object) -> bool:
    if _kind(left) is not _kind(right):
        return False
    if op == "=~":
        return isinstance(left, str) and isinstance(right, str) and _matches(right, left)
    if isinstance(left, q.Duration) and isinstance(right, q.Duration):
        return bool(_ORDER[op](left.ns, right.ns))
    if isinstance(left, str | int | float) and not isinstance(left, bool):
        return bool(_ORDER[op](left, right))
    return op == "=" and left == right


def values(operand: q.Operand, span: Span, of_trace: TraceFacts) -> Sequence[object]:
    """The values of an operand: none when it is absent, several when it is an array."""
    if isinstance(operand, q.Constant):
        return (operand.value,)
    if operand.scope == "intrinsic":
        return (_intrinsic(operand.name, span, of_trace),)
    if operand.scope == "resource" or (operand.scope == "any" and operand.name not in span.attributes):
        return plain(span.resource.get(operand.name))
    return plain(span.attributes.get(operand.name))


def plain(value: AttributeValue) -> Sequence[object]:
    """The values that an attribute compares as."""
    if value is None:
        return ()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [item for item in value if item is not None]
    return (value,)


def _intrinsic(name: str, span: Span, of_trace: TraceFacts) -> object:
    match name:
        case "name":
            return span.name
        case "status":
            return q.Word(span.status.lower())
        case "kind":
            return q.Word(span.kind.lower())
        case "duration":
            return q.Duration(max(0, span.end_ns - span.start_ns))
        case "statusMessage":
            return span.status_message
        case "trace:id":
            return span.trace_id
        case "span:id":
            return span.span_id
        case "span:parentID":
            return span.parent_id or ""
        case "instrumentation:name":
            return span.scope
        case "rootName":
            return of_trace.root_name
        case "rootServiceName":
            return of_trace.root_service
    return q.Duration(of_trace.duration_ns)


def select(query: q.Query, trace: Trace, of_trace: TraceFacts) -> list[Span]:
    """The spans of a whole trace that a query selects, in order of start time; none when none match."""
    if isinstance(query, q.Spanset):
        return [span for span in trace.spans if holds(query.condition, span, of_trace)]
    left = select(query.left, trace, of_trace)
    right = select(query.right, trace, of_trace)
    match query.op:
        case "&&":
            chosen = left + right if left and right else []
        case "||":
            chosen = left + right
        case ">":
            ids = {span.span_id for span in left}
            chosen = [span for span in right if span.parent_id in ids]
        case _:
            ids = {span.span_id for span in left}
            chosen = [span for span in right if any(a.span_id in ids for a in trace.ancestors(span))]
    kept = {id(span) for span in chosen}
    return [span for span in trace.spans if id(span) in kept]
