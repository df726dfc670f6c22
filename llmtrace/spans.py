"""Spans for the hot paths of picker and sidecar, and their fast export.

A request has nine spans in the picker and about half a millisecond to spend on all of them; the SDK's spans and its
OTLP encoder together take that long. Here a span is a plain record that is encoded when it ends, from pieces that are
mostly known already: names, weights and endpoints repeat from request to request. The SDK's sampler, batching, retries
and OTLP connection stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from time import time_ns
from typing import Self

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ResourceMessage
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Value = str | bool | int | float | tuple[str, ...] | tuple[int, ...] | tuple[float, ...]
"""Value of an attribute; hashable, so that its encoding can be remembered."""
Attributes = dict[str, Value]

_propagator = TraceContextTextMapPropagator()
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED = TraceFlags(TraceFlags.DEFAULT)
_CACHED_ATTRIBUTES = 4096
# OTLP SpanFlags, above the eight bits of W3C flags: whether the parent is remote is known, and is so.
_HAS_IS_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_IS_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


class Span:
    """A span. Times in nanoseconds since the epoch.

    When the first span of the process ends, all ended ones of the request are encoded and queued for export, if
    sampled: by then the request is on its way.
    """

    __slots__ = (
        *("_end_ns", "_ended", "_error", "_first", "_kind", "_parent", "_start_ns"),
        *("attributes", "context", "encoded", "links", "name", "tracer"),
    )

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        ended: list[Span] | None = None,
    ) -> None:
        self.tracer = tracer
        self.name = name
        self.context = context
        self.attributes: Attributes = {}
        self.links: tuple[SpanContext, ...] = ()
        self._parent = parent
        self._kind = kind
        self._error: tuple[str, str, int] | None = None
        self.encoded = b""
        self._first = ended is None
        self._ended: list[Span] = [] if ended is None else ended
        self._end_ns = 0
        self._start_ns = time_ns()

    @property
    def recording(self) -> bool:
        """Whether the span will be exported; if not, attributes need not be computed."""
        return bool(self.context.trace_flags & TraceFlags.SAMPLED)

    def child(self, name: str, kind: SpanKind = SpanKind.INTERNAL, tracer: Tracer | None = None) -> Span:
        """Start a span below this one; another ``tracer`` gives it another instrumentation scope."""
        context = self.context
        own = SpanContext(context.trace_id, _span_id(), False, context.trace_flags, context.trace_state)
        return Span(tracer or self.tracer, name, own, context, kind, self._ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.end()

    def fail(self, error_type: str, message: str, *, event: bool = True) -> None:
        """Set status ERROR, with an exception event as OpenTelemetry's conventions have it."""
        self._error = (error_type if event else "", message, time_ns())

    def end(self, end_ns: int | None = None) -> None:
        """End the span, now or at ``end_ns``."""
        if not self.recording:
            return
        self._end_ns = end_ns or time_ns()
        self._ended.append(self)
        if self._first:
            for span in self._ended:
                span.encoded = span.encode()
                span.tracer.export(span)

    def encode(self) -> bytes:
        """The ended span as an OTLP message: its own part, then those of its attributes, which may stand anywhere."""
        context, parent = self.context, self._parent
        message = trace_pb2.Span(
            trace_id=context.trace_id.to_bytes(16, "big"),
            span_id=context.span_id.to_bytes(8, "big"),
            name=self.name,
            kind=self._kind.value + 1,  # type: ignore[arg-type]
            start_time_unix_nano=self._start_ns,
            end_time_unix_nano=self._end_ns,
            flags=context.trace_flags | _HAS_IS_REMOTE,
        )
        if parent is not None:
            message.parent_span_id = parent.span_id.to_bytes(8, "big")
            if parent.is_remote:
                message.flags |= _IS_REMOTE
        if context.trace_state:
            message.trace_state = context.trace_state.to_header()
        for link in self.links:
            message.links.add(
                trace_id=link.trace_id.to_bytes(16, "big"),
                span_id=link.span_id.to_bytes(8, "big"),
                flags=_HAS_IS_REMOTE | (_IS_REMOTE if link.is_remote else 0),
            )
        if self._error is not None:
            _encode_error(message, *self._error)
        attributes = [_attribute(key, value) for key, value in self.attributes.items()]
        return message.SerializeToString() + b"".join(attributes)


class Tracer:
    """Starts spans of one instrumentation scope; sampling is that of ``provider``, export that of ``processor``."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor | None, scope: str) -> None:
        self.resource: Resource = provider.resource
        self.scope = scope
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
        return Span(self, name, SpanContext(trace_id, _span_id(), False, flags, state), parent, kind)

    def export(self, span: Span) -> None:
        """Queue an ended span."""
        if self._processor is not None:
            # A batch processor asks for the span's context and hands the span on to the exporter, which is ours.
            self._processor.on_end(span)  # type: ignore[arg-type]


NO_SPAN = Span(Tracer(TracerProvider(), None, ""), "", INVALID_SPAN_CONTEXT, None, SpanKind.INTERNAL)
"""Where nothing is traced."""


class FastSpanExporter(OTLPSpanExporter):
    """OTLP gRPC exporter of :class:`Span`.

    ``_translate_data`` is the method in which the SDK's exporter encodes a batch; a unit test shows that it is.
    """

    def _translate_data(self, data: Sequence[ReadableSpan | Span]) -> ExportTraceServiceRequest:
        return otlp_request([span for span in data if isinstance(span, Span)])


def remote_parent(*carriers: Mapping[str, str]) -> SpanContext | None:
    """The caller's span: that of the first carrier (headers by their names in lower case) that has a valid one."""
    for carrier in carriers:
        if "traceparent" in carrier:
            context = get_current_span(_propagator.extract(carrier)).get_span_context()
            if context.is_valid:
                return context
    return None


def traceparent(context: SpanContext) -> str:
    """W3C traceparent header of a span."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def otlp_request(spans: Sequence[Span]) -> ExportTraceServiceRequest:
    """Ended spans as an OTLP request, grouped by resource and scope."""
    request = ExportTraceServiceRequest()
    resources: dict[int, trace_pb2.ResourceSpans] = {}
    groups: dict[tuple[int, str], trace_pb2.ScopeSpans] = {}
    for span in spans:
        resource, scope = span.tracer.resource, span.tracer.scope
        key = id(resource), scope
        if key not in groups:
            if key[0] not in resources:
                resources[key[0]] = request.resource_spans.add(resource=_resource(resource))
            groups[key] = resources[key[0]].scope_spans.add()
            groups[key].scope.name = scope
        groups[key].spans.add().MergeFromString(span.encoded)
    return request


def _span_id() -> int:
    return random.getrandbits(64) or 1


def _resource(resource: Resource) -> ResourceMessage:
    return ResourceMessage(
        attributes=[KeyValue(key=key, value=_any_value(value)) for key, value in resource.attributes.items()]
    )


def _encode_error(message: trace_pb2.Span, error_type: str, text: str, time: int) -> None:
    message.status.code = trace_pb2.Status.STATUS_CODE_ERROR
    message.status.message = text
    if not error_type:
        return
    attributes = {"exception.type": error_type, "exception.message": text}
    message.events.add(
        name="exception",
        time_unix_nano=time,
        attributes=[KeyValue(key=key, value=_any_value(value)) for key, value in attributes.items()],
    )


@lru_cache(_CACHED_ATTRIBUTES, typed=True)
def _attribute(key: str, value: Value) -> bytes:
    """An attribute as the field of a Span message."""
    return trace_pb2.Span(attributes=[KeyValue(key=key, value=_any_value(value))]).SerializeToString()


def _any_value(value: object) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=value)
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, Sequence):
        return AnyValue(array_value=ArrayValue(values=[_any_value(item) for item in value]))
    return AnyValue(string_value=str(value))
