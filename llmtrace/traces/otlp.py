"""OTLP trace data, to and from the kit's model.

The messages are those of ``opentelemetry-proto`` (trace v1); the request encodings are those of the OTLP
specification, section OTLP/HTTP: binary protobuf, and JSON protobuf with hexadecimal ids.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

from llmtrace.traces.model import Attributes, AttributeValue, Event, Link, Span, Trace

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
"""Names of the span kinds, by their number."""
STATUSES = ("UNSET", "OK", "ERROR")
"""Names of the status codes, by their number."""


class MalformedError(ValueError):
    """Bytes that are no OTLP trace data. The message is one sentence and holds nothing of the payload."""


def value(any_value: AnyValue) -> AttributeValue:
    """An AnyValue as plain Python; None for an empty one."""
    match any_value.WhichOneof("value"):
        case "string_value":
            return any_value.string_value
        case "bool_value":
            return any_value.bool_value
        case "int_value":
            return any_value.int_value
        case "double_value":
            return any_value.double_value
        case "bytes_value":
            return any_value.bytes_value
        case "array_value":
            return [value(item) for item in any_value.array_value.values]
        case "kvlist_value":
            return attributes(any_value.kvlist_value.values)
    return None


def attributes(pairs: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    """KeyValues as a dict; of a key that occurs twice, the last value."""
    return {pair.key: value(pair.value) for pair in pairs}


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else names[0]


def span(message: pb.Span, resource: Attributes, scope: str) -> Span:
    """One span of the model. Kinds and statuses of a later OTLP read as UNSPECIFIED and UNSET."""
    parent = message.parent_span_id
    return Span(
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        parent_id=parent.hex() if any(parent) else None,
        name=message.name,
        kind=_name(KINDS, message.kind),
        start_ns=message.start_time_unix_nano,
        end_ns=message.end_time_unix_nano,
        status=_name(STATUSES, message.status.code),
        status_message=message.status.message,
        attributes=attributes(message.attributes),
        resource=resource,
        scope=scope,
        events=tuple(Event(e.name, e.time_unix_nano, attributes(e.attributes)) for e in message.events),
        links=tuple(Link(x.trace_id.hex(), x.span_id.hex(), attributes(x.attributes)) for x in message.links),
    )


def spans(resource_spans: Iterable[pb.ResourceSpans]) -> Iterator[Span]:
    """All spans, in the order of the message. Spans of one resource share its attributes."""
    for of_resource in resource_spans:
        resource = attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for message in of_scope.spans:
                yield span(message, resource, of_scope.scope.name)


def decode_trace(trace_id: str, data: bytes) -> Trace | None:
    """A trace from a serialized TracesData (Tempo's ``Trace`` has the same encoding).

    Identical spans appear once. None when there is no span; MalformedError when the bytes are no such
    message.
    """
    try:
        message = pb.TracesData.FromString(data)
    except DecodeError:
        raise MalformedError("the bytes are no protobuf message of type Trace") from None
    found = tuple(_distinct(spans(message.resource_spans)))
    return Trace(trace_id, found) if found else None


def _distinct(found: Iterable[Span]) -> Iterator[Span]:
    seen: dict[str, list[Span]] = {}
    for one in found:
        same_id = seen.setdefault(one.span_id, [])
        if one not in same_id:
            same_id.append(one)
            yield one


def any_value(plain: AttributeValue) -> AnyValue:
    """Plain Python as an AnyValue. OverflowError or ValueError for an int beyond 64 bits."""
    match plain:
        case None:
            return AnyValue()
        case bool():
            return AnyValue(bool_value=plain)
        case str():
            return AnyValue(string_value=plain)
        case int():
            return AnyValue(int_value=plain)
        case float():
            return AnyValue(double_value=plain)
        case bytes():
            return AnyValue(bytes_value=plain)
        case Mapping():
            message = AnyValue()
            message.kvlist_value.SetInParent()
            message.kvlist_value.values.extend(key_values(plain))
            return message
    message = AnyValue()
    message.array_value.SetInParent()
    message.array_value.values.extend(any_value(item) for item in plain)
    return message


def key_values(plain: Attributes) -> list[KeyValue]:
    """A dict of attributes as KeyValues."""
    return [KeyValue(key=key, value=any_value(item)) for key, item in plain.items()]


def encode(found: Iterable[Span]) -> pb.TracesData:
    """Spans of the model as a message; neighbours of the same resource and scope share a group."""
    data = pb.TracesData()
    last: tuple[Attributes, str] | None = None
    for one in found:
        if last != (one.resource, one.scope):
            of_resource = data.resource_spans.add()
            of_resource.resource.attributes.extend(key_values(one.resource))
            of_resource.scope_spans.add().scope.name = one.scope
            last = (one.resource, one.scope)
        data.resource_spans[-1].scope_spans[-1].spans.append(_message(one))
    return data


def _message(one: Span) -> pb.Span:
    message = pb.Span(
        trace_id=bytes.fromhex(one.trace_id),
        span_id=bytes.fromhex(one.span_id),
        parent_span_id=bytes.fromhex(one.parent_id or ""),
        name=one.name,
        kind=pb.Span.SpanKind.ValueType(KINDS.index(one.kind)),
        start_time_unix_nano=one.start_ns,
        end_time_unix_nano=one.end_ns,
        attributes=key_values(one.attributes),
        events=[
            pb.Span.Event(name=e.name, time_unix_nano=e.time_ns, attributes=key_values(e.attributes))
            for e in one.events
        ],
        links=[
            pb.Span.Link(
                trace_id=bytes.fromhex(x.trace_id),
                span_id=bytes.fromhex(x.span_id),
                attributes=key_values(x.attributes),
            )
            for x in one.links
        ],
    )
    if one.status != "UNSET" or one.status_message:
        message.status.code = pb.Status.StatusCode.ValueType(STATUSES.index(one.status))
        message.status.message = one.status_message
    return message


def parse_request(body: bytes, content_type: str) -> ExportTraceServiceRequest:
    """The request of an OTLP/HTTP body, of content type PROTOBUF or JSON. MalformedError when it is none."""
    if content_type == PROTOBUF:
        try:
            return ExportTraceServiceRequest.FromString(body)
        except DecodeError:
            raise MalformedError("the body is no protobuf message ExportTraceServiceRequest") from None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedError("the body is no JSON document") from None
    if not isinstance(document, dict):
        raise MalformedError("the body is JSON, but no object of type ExportTraceServiceRequest")
    for message in _span_objects(document):
        _ids_to_base64(message, "span", ("traceId", "trace_id", "spanId", "span_id", *_PARENT))
        for link in _objects(message, "links", "links"):
            _ids_to_base64(link, "link", ("traceId", "trace_id", "spanId", "span_id"))
    try:
        return json_format.ParseDict(document, ExportTraceServiceRequest(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError):
        raise MalformedError(
            "the body is JSON, but a field has not the type that ExportTraceServiceRequest gives it"
        ) from None


_PARENT = ("parentSpanId", "parent_span_id")


def _objects(parent: Mapping[str, Any], *keys: str) -> Iterator[dict[str, Any]]:
    for key in dict.fromkeys(keys):
        items = parent.get(key)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                yield item


def _span_objects(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for of_resource in _objects(document, "resourceSpans", "resource_spans"):
        for of_scope in _objects(of_resource, "scopeSpans", "scope_spans"):
            yield from _objects(of_scope, "spans")


def _ids_to_base64(message: dict[str, Any], what: str, keys: Iterable[str]) -> None:
    for key in keys:
        given = message.get(key)
        if given is None:
            continue
        try:
            message[key] = base64.b64encode(binascii.unhexlify(given)).decode()
        except (ValueError, TypeError):
            raise MalformedError(f"the {key} of a {what} is no hexadecimal string") from None
