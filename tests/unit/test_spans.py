from __future__ import annotations

from typing import Any

import pytest
from memory import Memory
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from llmtrace.spans import FastSpanExporter, Span, Tracer, otlp_request
from llmtrace.traces import otlp

REMOTE = SpanContext(1 << 100, 7, True, TraceFlags(1), TraceState([("vendor", "x")]))
RESOURCE = Resource({"service.name": "llm-d-epp", "n": 1, "b": True, "f": 0.5, "s": ("x", "y")})


def make(sampler: Sampler | None = None) -> tuple[Tracer, Memory]:
    memory = Memory()
    return Tracer(TracerProvider(resource=RESOURCE, sampler=sampler), memory, "outer"), memory


def readable(span: Span, start: int, end: int, events: list[Event]) -> ReadableSpan:
    """The same span of the SDK."""
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span._parent,
        resource=RESOURCE,
        attributes=span.attributes,
        events=events,
        links=[Link(context) for context in span.links],
        kind=span._kind,
        status=Status(StatusCode.ERROR, events[0].attributes["exception.message"]) if events else None,  # type: ignore[index, arg-type]
        start_time=start,
        end_time=end,
        instrumentation_scope=InstrumentationScope(span.tracer.scope),
    )


def test_the_encoding_is_that_of_the_sdk() -> None:
    tracer, memory = make()
    root = tracer.start("gateway.request", REMOTE, SpanKind.SERVER)
    root.links = (SpanContext(5, 6, True, TraceFlags(1)), SpanContext(8, 9, False, TraceFlags(0)))
    root.attributes = {"text": "ä", "yes": True, "many": 3, "share": 0.5, "names": ("a", "b"), "scores": (1.0, 0.0)}
    child = root.child("inner", tracer=tracer.scoped("inner"))
    child.attributes = {"none": (), "tokens": (1, 2), "one": 1, "true": True}
    child.fail("BadRequest", "wrong")
    child.end()
    root.end()
    ours = list(otlp.spans(otlp_request(memory.ended).resource_spans))
    events = [
        [Event(event.name, event.attributes, event.time_ns) for event in span.events]  # type: ignore[arg-type]
        for span in ours
    ]
    pairs = zip(memory.ended, ours, events, strict=True)
    theirs = encode_spans([readable(span, mine.start_ns, mine.end_ns, found) for span, mine, found in pairs])
    assert ours == list(otlp.spans(theirs.resource_spans))
    sent, expected = (
        [span for r in request.resource_spans for group in r.scope_spans for span in group.spans]
        for request in (otlp_request(memory.ended), theirs)
    )
    assert [span.flags for span in sent] == [0x101, 0x301], "sampled; whether the parent is remote"
    assert [span.links for span in sent] == [span.links for span in expected]


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1, True), (0.0, False)])
def test_equal_values_of_other_types_are_told_apart(first: Any, second: Any) -> None:
    tracer, memory = make()
    for value in (first, second):
        span = tracer.start("x", None, SpanKind.SERVER)
        span.attributes["same"] = value
        span.end()
    found = [type(span.attributes["same"]) for span in memory.spans()]
    assert found == [type(first), type(second)]


def test_the_exporter_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the SDK that encodes elsewhere would send nothing."""
    tracer, memory = make()
    tracer.start("x", None, SpanKind.SERVER).end()
    exporter, sent = FastSpanExporter(endpoint="http://127.0.0.1:9", insecure=True), []
    client = type("Client", (), {"Export": staticmethod(lambda request, **_: sent.append(request))})
    monkeypatch.setattr(exporter, "_client", client)
    exporter.export(memory.ended)
    exporter.shutdown()
    assert [span.name for span in otlp.spans(sent[0].resource_spans)] == ["x"]


def test_a_child_hangs_under_its_parent_and_keeps_the_trace_state() -> None:
    tracer, memory = make()
    root = tracer.start("root", REMOTE, SpanKind.SERVER)
    child = root.child("child", SpanKind.SERVER)
    child.end()
    root.end()
    inner, outer = memory.spans()
    assert (outer.parent_id, inner.parent_id) == (f"{REMOTE.span_id:016x}", outer.span_id)
    assert {inner.trace_id, outer.trace_id} == {f"{REMOTE.trace_id:032x}"}
    assert child.context.trace_state.to_header() == "vendor=x"
    assert outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns


@pytest.mark.parametrize(
    ("sampler", "parent", "sampled"),
    [
        (None, None, True),
        (ALWAYS_OFF, REMOTE, False),
        (ParentBased(ALWAYS_OFF), REMOTE, True),
        (ParentBased(ALWAYS_OFF), None, False),
        (ParentBased(TraceIdRatioBased(1)), SpanContext(1, 2, True, TraceFlags(0)), False),
    ],
)
def test_sampling_is_that_of_the_sdk(sampler: Sampler | None, parent: SpanContext | None, sampled: bool) -> None:
    tracer, memory = make(sampler)
    span = tracer.start("x", parent, SpanKind.SERVER)
    span.child("y").end()
    span.end()
    assert span.recording is sampled
    assert len(memory.ended) == (2 if sampled else 0)


def test_without_exporter_nothing_is_recorded() -> None:
    tracer = Tracer(TracerProvider(), None, "x")
    span = tracer.start("x", REMOTE, SpanKind.SERVER)
    assert not span.recording
    assert not tracer.enabled
    span.end()
