"""Turns an OTLP request into rows of the database.

A row is the serialized span beside the columns that searches select by. Two of the columns stand for the
span's attributes: ``shape``, a hash of the names of its attributes, and ``terms``, one hash per attribute and
value. Both are hashes, so a search that uses them verifies what it finds on the span itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import xxhash
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

MAX_TIME_NS = 2**63 - 1
_TRACE_ID_BYTES, _SPAN_ID_BYTES = 16, 8

SCHEMA = pa.schema(
    [
        ("trace_high", pa.uint64()),
        ("trace_low", pa.uint64()),
        ("span_id", pa.uint64()),
        ("parent_id", pa.uint64()),
        ("name", pa.string()),
        ("kind", pa.uint8()),
        ("status", pa.uint8()),
        ("start_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("resource", pa.uint64()),
        ("shape", pa.uint64()),
        ("terms", pa.list_(pa.uint32())),
        ("received_ms", pa.int64()),
        ("payload", pa.binary()),
    ]
)
"""The columns of the table ``spans``; times in nanoseconds, ``received_ms`` in Unix milliseconds."""


@dataclass(slots=True)
class Batch:
    """The spans of one request as rows, and what is wrong with those that are none."""

    rows: list[tuple[object, ...]] = field(default_factory=list)
    term_ends: list[int] = field(default_factory=lambda: [0])
    terms: list[int] = field(default_factory=list)
    resources: dict[int, bytes] = field(default_factory=dict)
    """Serialized ResourceSpans without spans (resource, scope, schema URLs), by hash."""
    shapes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Sorted names of attributes, by hash."""
    rejected: int = 0
    complaint: str = ""
    payload_bytes: int = 0

    def __len__(self) -> int:
        return len(self.rows)


def term(key: str, plain: str | bool | float) -> int:
    """The hash of an attribute and its value; an int and a float of equal value have the same."""
    if isinstance(plain, str):
        text = f"{key}\0s{plain}"
    elif isinstance(plain, bool):
        text = f"{key}\0b{plain}"
    else:
        text = f"{key}\0n{float(plain) + 0.0!r}"  # -0.0 equals 0.0
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def shape(keys: Iterable[str]) -> tuple[int, tuple[str, ...]]:
    """The hash of a set of attribute names, and the names sorted."""
    names = tuple(sorted(set(keys)))
    return xxhash.xxh3_64_intdigest("\0".join(names).encode()), names


def trace_key(trace_id: bytes) -> tuple[int, int]:
    """The columns ``trace_high`` and ``trace_low`` of a trace id of 16 bytes."""
    high, low = struct.unpack(">QQ", trace_id)
    return high, low


def _plain_terms(key: str, any_value: AnyValue, terms: list[int]) -> None:
    match any_value.WhichOneof("value"):
        case "string_value":
            terms.append(term(key, any_value.string_value))
        case "int_value":
            terms.append(term(key, any_value.int_value))
        case "double_value":
            terms.append(term(key, any_value.double_value))
        case "bool_value":
            terms.append(term(key, any_value.bool_value))
        case "array_value":
            for item in any_value.array_value.values:
                if not item.HasField("array_value"):
                    _plain_terms(key, item, terms)


def _complaint(message: pb.Span) -> str:
    if len(message.trace_id) != _TRACE_ID_BYTES or not any(message.trace_id):
        return "a trace id is not 16 bytes, or is zero"
    if len(message.span_id) != _SPAN_ID_BYTES or not any(message.span_id):
        return "a span id is not 8 bytes, or is zero"
    if message.parent_span_id and len(message.parent_span_id) != _SPAN_ID_BYTES:
        return "a parent span id is not 8 bytes"
    return ""


def prepare(request: ExportTraceServiceRequest) -> Batch:
    """The rows of a request; spans with invalid ids are left out and counted."""
    batch = Batch()
    shapes: dict[tuple[str, ...], int] = {}
    for of_resource in request.resource_spans:
        for of_scope in of_resource.scope_spans:
            resource = _resource(of_resource, of_scope, batch.resources)
            for message in of_scope.spans:
                complaint = _complaint(message)
                if complaint:
                    batch.rejected += 1
                    batch.complaint = complaint
                else:
                    _append(batch, message, resource, shapes)
    return batch


def _resource(of_resource: pb.ResourceSpans, of_scope: pb.ScopeSpans, known: dict[int, bytes]) -> int:
    envelope = pb.ResourceSpans(resource=of_resource.resource, schema_url=of_resource.schema_url)
    envelope.scope_spans.add(scope=of_scope.scope, schema_url=of_scope.schema_url)
    serialized = envelope.SerializeToString(deterministic=True)
    key = xxhash.xxh3_64_intdigest(serialized)
    known[key] = serialized
    return key


def _append(batch: Batch, message: pb.Span, resource: int, shapes: dict[tuple[str, ...], int]) -> None:
    keys = []
    terms = batch.terms
    for pair in message.attributes:
        key = pair.key
        keys.append(key)
        _plain_terms(key, pair.value, terms)
    of_shape = tuple(keys)
    shape_key = shapes.get(of_shape)
    if shape_key is None:
        shape_key, names = shape(keys)
        shapes[of_shape] = shape_key
        batch.shapes[shape_key] = names
    batch.term_ends.append(len(terms))
    payload = message.SerializeToString()
    batch.payload_bytes += len(payload)
    high, low = struct.unpack(">QQ", message.trace_id)
    batch.rows.append(
        (
            high,
            low,
            int.from_bytes(message.span_id),
            int.from_bytes(message.parent_span_id),
            message.name,
            message.kind if 0 <= message.kind < 256 else 0,
            message.status.code if 0 <= message.status.code < 256 else 0,
            min(message.start_time_unix_nano, MAX_TIME_NS),
            min(message.end_time_unix_nano, MAX_TIME_NS),
            resource,
            shape_key,
            payload,
        )
    )


def table(batches: Iterable[Batch], received_ms: int) -> pa.Table:
    """All rows of the batches as one Arrow table of SCHEMA."""
    rows: list[tuple[object, ...]] = []
    ends = [0]
    terms: list[int] = []
    for batch in batches:
        rows += batch.rows
        ends += [len(terms) + end for end in batch.term_ends[1:]]
        terms += batch.terms
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(12)]
    arrays = [pa.array(column, SCHEMA.field(i).type) for i, column in enumerate(columns[:11])]
    arrays.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(terms, pa.uint32())))
    arrays.append(pa.array([received_ms] * len(rows), pa.int64()))
    arrays.append(pa.array(columns[11], pa.binary()))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def serialize(rows: Iterable[tuple[int, bytes]], resources: Mapping[int, bytes]) -> bytes:
    """A serialized TracesData of rows (resource, payload); identical rows appear once."""
    groups: dict[int, list[bytes]] = {}
    for resource, payload in dict.fromkeys(rows):
        groups.setdefault(resource, []).append(payload)
    data = pb.TracesData()
    for resource, payloads in groups.items():
        of_resource = data.resource_spans.add()
        of_resource.ParseFromString(resources.get(resource, b""))
        of_scope = of_resource.scope_spans[0] if of_resource.scope_spans else of_resource.scope_spans.add()
        for payload in payloads:
            of_scope.spans.add().ParseFromString(payload)
    return data.SerializeToString()
