from __future__ import annotations

import pytest
from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState

from llmtrace.picker.spans import FastSpanExporter, Tracer, encode

REMOTE = SpanContext(1 << 100, 7, True, TraceFlags(1), TraceState([("vendor", "x")]))


def make(sampler: object = None) -> tuple[Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "llm-d-epp", "n": 1}), sampler=sampler)  # type: ignore[arg-type]
    return Tracer(provider, SimpleSpanProcessor(exporter), "outer"), exporter


def test_the_encoding_is_that_of_the_sdk() -> None:
    tracer, exporter = make()
    root = tracer.start("gateway.request", REMOTE, SpanKind.SERVER)
    root.attributes = {"text": "ä", "yes": True, "many": 3, "share": 0.5, "names": ["a", "b"], "scores": [1.0, 0.0]}
    child = root.child("inner", tracer=tracer.scoped("inner"))
    child.attributes = {"none": [], "tokens": (1, 2)}
    child.fail("BadRequest", "wrong")
    child.end()
    root.end()
    spans = exporter.get_finished_spans()

    def by_name(message: object) -> dict[str, object]:
        content = json_format.MessageToDict(message)  # type: ignore[arg-type]
        (resource,) = content["resourceSpans"]
        for span in [span for scope in resource["scopeSpans"] for span in scope["spans"]]:
            # The SDK leaves the W3C flags out of the lower bits, and sends an empty status.
            span["flags"] &= ~0xFF
            span.setdefault("status", {})
        return {scope["scope"]["name"]: (resource["resource"], scope["spans"]) for scope in resource["scopeSpans"]}

    assert by_name(encode(spans)) == by_name(encode_spans(spans))


def test_the_exporter_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the SDK that encodes elsewhere would silently make the picker slow."""
    tracer, memory = make()
    tracer.start("x", None, SpanKind.SERVER).end()
    exporter, sent = FastSpanExporter(endpoint="http://127.0.0.1:9", insecure=True), []
    monkeypatch.setattr("llmtrace.picker.spans.encode", lambda spans: sent.append(spans) or encode(spans))
    monkeypatch.setattr(exporter, "_client", type("Client", (), {"Export": staticmethod(lambda **_: None)}))
    exporter.export(memory.get_finished_spans())
    exporter.shutdown()
    assert len(sent) == 1


def test_a_child_hangs_under_its_parent_and_keeps_the_trace_state() -> None:
    tracer, exporter = make()
    root = tracer.start("root", REMOTE, SpanKind.SERVER)
    child = root.child("child", SpanKind.SERVER)
    child.end()
    root.end()
    inner, outer = exporter.get_finished_spans()
    assert outer.parent == REMOTE
    assert inner.parent is not None
    assert outer.context is not None
    assert inner.context is not None
    assert inner.parent.span_id == outer.context.span_id
    assert {inner.context.trace_id, outer.context.trace_id} == {REMOTE.trace_id}
    assert inner.context.trace_state.to_header() == "vendor=x"
    assert (inner.start_time or 0) <= (inner.end_time or 0)


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
def test_sampling_is_that_of_the_sdk(sampler: object, parent: SpanContext | None, sampled: bool) -> None:
    tracer, exporter = make(sampler)
    span = tracer.start("x", parent, SpanKind.SERVER)
    span.child("y").end()
    span.end()
    assert span.recording is sampled
    assert len(exporter.get_finished_spans()) == (2 if sampled else 0)


def test_without_exporter_nothing_is_recorded() -> None:
    tracer = Tracer(TracerProvider(), None, "x")
    span = tracer.start("x", REMOTE, SpanKind.SERVER)
    assert not span.recording
    assert not tracer.enabled
    span.end()
