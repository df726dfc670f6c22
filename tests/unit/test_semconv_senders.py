"""What the kit's own senders send, on good paths and bad ones, against the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, TraceFlags
from picking import (
    DISAGGREGATED,
    Picker,
    chat,
    endpoint,
    request_body,
    request_headers,
    response_body,
    response_headers,
)
from picking import server as model_server
from test_engine_spans import any_facts
from test_scenario_driver import FakeServer, driver, exporter, server  # noqa: F401 - fixtures

from llmtrace.engine.facts import Facts
from llmtrace.engine.spans import write_aborted
from llmtrace.errors import UserError
from llmtrace.scenarios.driver import Driver
from llmtrace.scenarios.prefix_cache.workload import PrefixCacheWorkload
from llmtrace.semconv import attributes as a
from llmtrace.semconv.conformance import Finding, check
from llmtrace.traces import otlp
from llmtrace.traces.model import Span, Trace


def findings(spans: Iterable[Span], service: str) -> list[Finding]:
    """The differences of spans, as if their resource had the service's name."""
    named = sorted((replace(s, resource={"service.name": service}) for s in spans), key=lambda s: s.trace_id)
    assert named
    return check(Trace(i, tuple(group)) for i, group in groupby(named, key=lambda s: s.trace_id)).findings


@pytest.mark.parametrize("body", [chat("word " * 200), b"{", b'{"model": "smol"}', b'{"messages": "none"}'])
@pytest.mark.parametrize("status", [200, 503])
def test_the_picker(tmp_path: Path, body: bytes, status: int) -> None:
    picker = Picker(tmp_path)
    exchange = picker.exchange()
    exchange.handle(request_headers())
    exchange.handle(request_body(body))
    if not exchange.answered:
        exchange.handle(response_headers(status=status))
        usage = b'{"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}}'
        exchange.handle(response_body(b'{"choices": [{"finish_reason": "stop"}], "usage": ' + usage + b"}"))
    exchange.close()
    assert findings(picker.spans, a.PICKER_SERVICE) == []


def test_the_picker_without_body_without_endpoint_and_cancelled(tmp_path: Path) -> None:
    picker = Picker(tmp_path)
    for ready in (True, False):
        picker.handle.pool.replace([endpoint(0, ready=ready)])
        exchange = picker.exchange()
        exchange.handle(request_headers(end_of_stream=True))
        exchange.close(cancelled=True)
        exchange = picker.exchange()
        exchange.handle(request_headers())
        exchange.handle(request_body(chat("word")))
        exchange.close(cancelled=True)
    assert findings(picker.spans, a.PICKER_SERVICE) == []


@pytest.mark.parametrize("servers", [["prefill", "decode"], ["decode"], ["prefill"]])
def test_the_picker_that_splits(tmp_path: Path, servers: list[str]) -> None:
    picker = Picker(tmp_path, DISAGGREGATED, [model_server(role, waiting=1) for role in servers])
    for prompt in ("word " * 600, "word " * 600, "word"):
        exchange = picker.exchange()
        exchange.handle(request_headers())
        exchange.handle(request_body(chat(prompt)))
        exchange.handle(response_headers())
        exchange.handle(response_body(b"{}"))
        exchange.close()
    assert a.PD_PROFILE_SPAN in {span.name for span in picker.spans}
    assert findings(picker.spans, a.PICKER_SERVICE) == []


@pytest.mark.parametrize("fail", [False, True])
async def test_the_driver(
    driver: Driver,  # noqa: F811 - fixtures
    server: FakeServer,  # noqa: F811
    exporter: InMemorySpanExporter,  # noqa: F811
    fail: bool,
) -> None:
    server.fail = fail
    try:
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    except UserError:
        assert fail
    sent = otlp.spans(encode_spans(exporter.get_finished_spans()).resource_spans)
    assert findings(sent, a.CLIENT_SERVICE) == []


@given(any_facts(), st.booleans())
def test_the_vllm_plugin(facts: Facts, special: bool) -> None:
    """The spans of a request, under the llm_request that the plugin makes itself for one that is aborted."""
    if special:
        facts = replace(
            facts,
            lora="sql-adapter",
            structured_output=True,
            remote_engine_id="prefiller",
            draft_tokens=4,
            accepted_tokens=1,
        )
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    caller = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    write_aborted(provider.get_tracer(a.ENGINE_SCOPE), caller, facts, "cmpl-1")
    sent = list(otlp.spans(encode_spans(kept.get_finished_spans()).resource_spans))
    assert {span.name for span in sent} >= {a.SERVER_SPAN, a.QUEUE_SPAN}
    assert findings(sent, a.SERVER_SERVICE) == []


def test_llm_ds_own_picker() -> None:
    """The attributes that llm-d's code (v0.10.0, pkg/epp: scheduling, requestcontrol, disagg) sets, and no other."""
    request = {a.REQUEST_ID: "r1", a.REQUEST_MODEL: "smol"}
    scorer: dict[str, object] = {
        a.SCORER_TYPE: "queue-scorer",
        a.SCORER_NAME: "queue-scorer",
        a.SCORER_WEIGHT: 1.0,
        a.SCORER_CANDIDATES: 2,
    }
    scored: dict[str, object] = {a.SCORER_MAX: 1.0, a.SCORER_AVG: 1.0, a.SCORER_SCORED: 2}
    step: dict[str, object] = {**request, a.MM_MODALITY: "none", a.MM_HASH_COUNT: 0}
    encode: dict[str, object] = {a.EPP_ENCODE_USED: False, a.EPP_ENCODE_REASON: "no_encode_profile_result"}
    split: dict[str, object] = {a.EPP_PD_USED: True, a.EPP_PD_ADDRESS: "127.0.0.1", a.EPP_PD_PORT: "8101"}
    unified: dict[str, object] = {a.EPP_PD_USED: False, a.EPP_PD_REASON: "no_prefill_profile_result"}
    picked: dict[str, object] = {a.PICKER_CANDIDATES: 2, a.TOP_ENDPOINTS: ["default/a"], a.TOP_SCORES: [3.9]}
    rows: list[tuple[str, int | None, dict[str, object]]] = [
        (a.GATEWAY_SPAN, None, {}),
        (a.ORCHESTRATION_SPAN, 0, {a.TARGET_MODEL: "smol", a.REQUEST_PRIORITY: 0}),
        (a.PROFILE_SPAN, 1, {a.PROFILE_NAME: "default"}),
        (a.FILTER_SPAN, 2, {a.FILTER_CANDIDATES: 2, a.FILTER_REMAINING: 2, **request}),
        (a.SCORING_SPAN, 2, {a.SCORER_COUNT: 2, a.SCORING_CANDIDATES: 2, **request}),
        (a.SCORER_SPAN_PREFIX + "queue-scorer", 4, {**scorer, **scored}),
        (a.SCORER_SPAN_PREFIX + "session-affinity-scorer", 4, scorer),
        (a.PICK_SPAN, 2, {**picked, **request}),
        (a.PD_PROFILE_SPAN, 1, {**step, a.PROFILE_DECISION: "run_decode"}),
        (a.PD_PROFILE_SPAN, 1, {**step, a.PROFILE_DECISION: "complete", a.DECODE_FAILED: True}),
        (a.PD_SPAN, 1, {**step, **split, **encode}),
        (a.PD_SPAN, 1, {**step, **unified, **encode}),
    ]
    spans = [
        Span(
            trace_id="1" * 32,
            span_id=f"{number:016x}",
            parent_id="c" * 16 if parent is None else f"{parent:016x}",
            name=name,
            kind="SERVER" if name.startswith(a.GATEWAY_SPAN) else "INTERNAL",
            start_ns=number,
            end_ns=number,
            attributes=attributes,  # type: ignore[arg-type]
        )
        for number, (name, parent, attributes) in enumerate(rows)
    ]
    assert findings(spans, a.PICKER_SERVICE) == []
