"""Bodies of the answers of Tempo's HTTP API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf import json_format

from llmtrace.traces import otlp
from llmtrace.traces.model import AttributeValue, Span
from llmtrace.traces.store import traceql as q
from llmtrace.traces.store.search import Found

INTRINSIC_TAGS = sorted({name for name in q.INTRINSICS if name.isalpha()} | {"trace:id", "span:id"})


def trace_by_id_response(trace: bytes) -> bytes:
    """A serialized TraceByIDResponse with a serialized Trace as its first field."""
    length = len(trace)
    prefix = bytearray(b"\x0a")
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + trace


def search_response(query: q.Query, found: Iterable[Found], spans_per_set: int) -> dict[str, Any]:
    """A SearchResponse. Spans carry those of their attributes that the query names."""
    named = set(_named(query))
    return {"traces": [_metadata(one, named, spans_per_set) for one in found], "metrics": {}}


def _metadata(one: Found, named: set[tuple[str, str]], spans_per_set: int) -> dict[str, Any]:
    span_set = {
        "spans": [_span(span, named) for span in one.spans[:spans_per_set]],
        "matched": len(one.spans),
    }
    return {
        "traceID": one.trace_id,
        "rootServiceName": one.root_service,
        "rootTraceName": one.root_name,
        "startTimeUnixNano": str(one.start_ns),
        "durationMs": max(0, one.end_ns - one.start_ns) // 1_000_000,
        "spanSet": span_set,
        "spanSets": [span_set],
    }


def _span(span: Span, named: set[tuple[str, str]]) -> dict[str, Any]:
    attributes: dict[str, AttributeValue] = {}
    for scope, name in sorted(named):
        source = span.resource if scope == "resource" else span.attributes
        if scope == "any" and name not in source:
            source = span.resource
        if name in source:
            attributes[name] = source[name]
    return {
        "spanID": span.span_id,
        "name": span.name,
        "startTimeUnixNano": str(span.start_ns),
        "durationNanos": str(max(0, span.end_ns - span.start_ns)),
        "attributes": [json_format.MessageToDict(pair) for pair in otlp.key_values(attributes)],
    }


def _named(node: q.Query | q.Condition) -> Iterator[tuple[str, str]]:
    match node:
        case q.Join(left=left, right=right):
            yield from _named(left)
            yield from _named(right)
        case q.Spanset(condition=part) | q.Not(part=part):
            yield from _named(part)
        case q.And(parts=parts) | q.Or(parts=parts):
            for each in parts:
                yield from _named(each)
        case q.Truth(operand=operand):
            yield from _of(operand)
        case q.Comparison(left=one, right=other):
            yield from _of(one)
            yield from _of(other)


def _of(operand: q.Operand) -> Iterator[tuple[str, str]]:
    if isinstance(operand, q.Field) and operand.scope != "intrinsic":
        yield operand.scope, operand.name


def tags_v2_response(scope: str, of_spans: list[str], of_resources: list[str]) -> dict[str, Any]:
    """A SearchTagsV2Response of one scope, or of all for ""; an unknown scope has no tags."""
    by_scope = {"resource": of_resources, "span": of_spans, "intrinsic": INTRINSIC_TAGS}
    scopes = [{"name": name, "tags": tags} for name, tags in by_scope.items() if scope in ("", "none", name)]
    return {"scopes": scopes, "metrics": {}}


def tag_values(values: Iterable[object]) -> list[dict[str, str]]:
    """TagValues, with the types that TraceQL gives them."""
    return [dict(zip(("type", "value"), _typed(value), strict=True)) for value in values]


def _typed(value: object) -> tuple[str, str]:
    match value:
        case q.Word():
            return "keyword", value.text
        case q.Duration():
            return "duration", f"{value.ns:.0f}ns"
        case bool():
            return "bool", str(value).lower()
        case int():
            return "int", str(value)
        case float():
            return "float", repr(value)
    return "string", str(value)
