"""Spans for the picker's hot path, and their fast export.

A routed request has nine spans and about half a millisecond to spend on all of them. The SDK's spans and its OTLP
encoder together take that long. Here spans are plain records that become the SDK's ReadableSpan when they end; the
SDK's sampler, batching, retries and OTLP connection stay as they are. Only the encoding is the kit's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import time_ns

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ResourceMessage
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED = TraceFlags(TraceFlags.DEFAULT)


class Span:
    """A span in the making. Times in nanoseconds since the epoch; it is exported when it ends, if sampled."""

    __slots__ = (
        "_kind",
        "_parent",
        "_start_ns",
        "_tracer",
        "attributes",
        "context",
        "events",
        "name",
        "status",
    )

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, AttributeValue],
    ) -> None:
        self._tracer = tracer
        self._parent = parent
        self._kind = kind
        self._start_ns = time_ns()
        self.name = name
        self.context = context
        self.attributes = attributes
        self.events: list[Event] = []
        self.status = Status(StatusCode.UNSET)

    @property
    def recording(self) -> bool:
        """Whether the span will be exported; if not, attributes need not be computed."""
        return bool(self.context.trace_flags & TraceFlags.SAMPLED)

    def child(self, name: str, kind: SpanKind = SpanKind.INTERNAL, tracer: Tracer | None = None) -> Span:
        """Start a span below this one; another ``tracer`` gives it another instrumentation scope."""
        tracer = tracer or self._tracer
        parent = self.context
        context = SpanContext(parent.trace_id, _span_id(), False, parent.trace_flags, trace_state=parent.trace_state)
        return Span(tracer, name, context, parent, kind, {})

    def fail(self, error_type: str, message: str) -> None:
        """Set status ERROR, with an exception event as OpenTelemetry's conventions have it."""
        self.status = Status(StatusCode.ERROR, message)
        self.events.append(Event("exception", {"exception.type": error_type, "exception.message": message}, time_ns()))

    def end(self) -> None:
        """End the span now and hand it on for export."""
        if self.recording:
            self._tracer.export(
                ReadableSpan(
                    name=self.name,
                    context=self.context,
                    parent=self._parent,
                    resource=self._tracer.resource,
                    attributes=self.attributes,
                    events=self.events,
                    kind=self._kind,
                    status=self.status,
                    start_time=self._start_ns,
                    end_time=time_ns(),
                    instrumentation_scope=self._tracer.scope,
                )
            )


class Tracer:
    """Starts spans of one instrumentation scope; sampling is that of ``provider``, export that of ``processor``."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor | None, scope: str) -> None:
        self.resource: Resource = provider.resource
        self.scope = InstrumentationScope(scope)
        self._provider = provider
        self._processor = processor

    @property
    def enabled(self) -> bool:
        """Whether there is an exporter at all."""
        return self._processor is not None

    def scoped(self, scope: str) -> Tracer:
        """The same tracer for another instrumentation scope."""
        return Tracer(self._provider, self._processor, scope)

    def start(self, name: str, parent: SpanContext | None, kind: SpanKind) -> Span:
        """Start the first span of this process for a request; ``parent`` comes from the request, if anywhere."""
        trace_id = parent.trace_id if parent else random.getrandbits(128) or 1
        sampled = False
        state = parent.trace_state if parent else None
        if self._processor is not None:
            context = set_span_in_context(NonRecordingSpan(parent)) if parent else None
            result = self._provider.sampler.should_sample(context, trace_id, name, kind)
            sampled, state = result.decision is Decision.RECORD_AND_SAMPLE, result.trace_state
        flags = _SAMPLED if sampled else _NOT_SAMPLED
        return Span(self, name, SpanContext(trace_id, _span_id(), False, flags, state), parent, kind, {})

    def export(self, span: ReadableSpan) -> None:
        """Queue an ended span."""
        if self._processor is not None:
            self._processor.on_end(span)


def _span_id() -> int:
    return random.getrandbits(64) or 1


class FastSpanExporter(OTLPSpanExporter):
    """OTLP gRPC exporter that builds the protobuf messages without the SDK's intermediate steps.

    ``_translate_data`` is the method in which the SDK's exporter encodes a batch; a unit test compares the result
    with the SDK's own encoding.
    """

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        return encode(data)


def encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    """Spans as an OTLP request, grouped by resource and scope."""
    request = ExportTraceServiceRequest()
    groups: dict[tuple[int, int], trace_pb2.ScopeSpans] = {}
    resources: dict[int, trace_pb2.ResourceSpans] = {}
    for span in spans:
        key = id(span.resource), id(span.instrumentation_scope)
        if key not in groups:
            if key[0] not in resources:
                resources[key[0]] = request.resource_spans.add(resource=_resource(span.resource))
            groups[key] = resources[key[0]].scope_spans.add()
            if span.instrumentation_scope is not None:
                groups[key].scope.name = span.instrumentation_scope.name
        _encode_span(span, groups[key].spans.add())
    return request


def _resource(resource: Resource) -> ResourceMessage:
    message = ResourceMessage()
    for key, value in resource.attributes.items():
        _encode_attribute(message.attributes.add(), key, value)
    return message


def _encode_span(span: ReadableSpan, message: trace_pb2.Span) -> None:
    context, parent = span.get_span_context(), span.parent
    assert context is not None  # noqa: S101 - ended spans have one
    message.trace_id = context.trace_id.to_bytes(16, "big")
    message.span_id = context.span_id.to_bytes(8, "big")
    message.flags = context.trace_flags | 0x100
    if parent is not None:
        message.parent_span_id = parent.span_id.to_bytes(8, "big")
        if parent.is_remote:
            message.flags |= 0x200
    if context.trace_state:
        message.trace_state = context.trace_state.to_header()
    message.name = span.name
    message.kind = span.kind.value + 1  # type: ignore[assignment]
    message.start_time_unix_nano = span.start_time or 0
    message.end_time_unix_nano = span.end_time or 0
    attributes = message.attributes
    for key, value in (span.attributes or {}).items():
        _encode_attribute(attributes.add(), key, value)
    for event in span.events:
        target = message.events.add(name=event.name, time_unix_nano=event.timestamp)
        for key, value in (event.attributes or {}).items():
            _encode_attribute(target.attributes.add(), key, value)
    if span.status.status_code is not StatusCode.UNSET:
        message.status.code = span.status.status_code.value
        message.status.message = span.status.description or ""


def _encode_attribute(message: KeyValue, key: str, value: AttributeValue) -> None:
    message.key = key
    _encode_value(message.value, value)


def _encode_value(message: AnyValue, value: AttributeValue) -> None:
    kind = type(value)
    if kind is str:
        message.string_value = value  # type: ignore[assignment]
    elif kind is float:
        message.double_value = value  # type: ignore[assignment]
    elif kind is bool:
        message.bool_value = value  # type: ignore[assignment]
    elif kind is int:
        message.int_value = value  # type: ignore[assignment]
    elif isinstance(value, Sequence):
        values = message.array_value.values
        message.array_value.SetInParent()
        for item in value:
            _encode_value(values.add(), item)
    else:
        message.string_value = str(value)
