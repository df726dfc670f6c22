"""The driver against a small server that speaks the part of vLLM's protocol that it uses."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llmtrace.errors import UserError
from llmtrace.scenarios.driver import Driver, Settings, server_counters
from llmtrace.scenarios.pd_disaggregation.workload import PdWorkload, smoke_requests
from llmtrace.scenarios.prefix_cache.workload import PrefixCacheWorkload
from llmtrace.scenarios.smoke import send_smoke_requests


@dataclass
class FakeServer:
    """Counts as cached whatever it has seen under the same salt; 100 tokens a message, blocks of 16."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    queries: int = 0
    fail: bool = False
    hang: bool = False
    port: int = 0

    async def chat(self, request: HttpRequest) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if set(body["cache_salt"]) & set("@/\\\0"):
            return JSONResponse({"error": {"message": "cache_salt"}}, 400)
        if self.fail:
            return JSONResponse({"error": {"message": "no endpoint"}}, 503)
        if self.hang:
            await asyncio.sleep(30)
        prompt = 100 * len(body["messages"])
        key = body["cache_salt"] + body["messages"][0]["content"]
        cached = min(self.seen.get(key, 0), prompt) // 16 * 16
        self.seen[key] = max(self.seen.get(key, 0), prompt)
        self.hits += cached
        self.queries += prompt
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": 2,
            "total_tokens": prompt + 2,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return StreamingResponse(self.stream(usage), media_type="text/event-stream")

    async def stream(self, usage: dict[str, Any]) -> AsyncIterator[str]:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "smol"}

        def event(choices: list[dict[str, Any]], **more: object) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

        yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        await asyncio.sleep(0.03)
        yield event([{"index": 0, "delta": {"content": "Good"}}])
        yield event([{"index": 0, "delta": {"content": " day"}, "finish_reason": "length"}])
        yield event([], usage=usage)
        yield "data: [DONE]\n\n"

    async def metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(
            "# TYPE vllm:prefix_cache_hits counter\n"
            f'vllm:prefix_cache_hits_total{{engine="0"}} {self.hits}.0\n'
            "# TYPE vllm:prefix_cache_queries counter\n"
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.queries}.0\n'
            "# TYPE vllm:cache_config_info gauge\n"
            'vllm:cache_config_info{block_size="16",engine="0"} 1.0\n'
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    routes = [Route("/v1/chat/completions", fake.chat, methods=["POST"]), Route("/metrics", fake.metrics)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fake.port = listener.getsockname()[1]
        running = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield fake
        running.should_exit = True
        running.force_exit = True
        thread.join(10)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def driver(server: FakeServer, exporter: InMemorySpanExporter) -> Driver:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = Settings(
        "prefix-cache",
        "smol",
        {"prefix-aware": server.url, "random": server.url},
        {"vllm-0": server.url},
        ("prefix-aware", "random"),
        warmups=1,
    )
    return Driver(settings, provider)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_run_sends_the_same_requests_by_both_arms(
    driver: Driver, server: FakeServer, exporter: InMemorySpanExporter, tmp_path: Path
) -> None:
    done: list[str] = []
    driver.progress = done.append
    workload = PrefixCacheWorkload(blocks=2, conversations=1, turns=2)
    record = await driver.run(workload)
    assert record.requests == len(done) == 2 * workload.size
    assert record.failed == 0
    spans = [s for s in exporter.get_finished_spans() if s.name == "chat smol"]
    measured = [s for s in spans if "llmtrace.scenario.warmup" not in attributes(s)]
    assert len(spans) - len(measured) == 2
    by_arm = {
        arm: {
            attributes(s)["llmtrace.scenario.pair_id"]
            for s in measured
            if attributes(s)["llmtrace.scenario.arm"] == arm
        }
        for arm in ("prefix-aware", "random")
    }
    assert by_arm["prefix-aware"] == by_arm["random"]
    assert len(by_arm["random"]) == workload.size
    for span in measured:
        told = attributes(span)
        assert 25 < told["llmtrace.client.ttft_ms"] < told["llmtrace.client.e2e_ms"] + 0.001
        assert told["gen_ai.usage.output_tokens"] == 2
        assert [e.name for e in span.events] == ["first_token"]
    saved = record.save(tmp_path)
    assert json.loads(saved.read_text())["run_id"] == driver.run_id


async def test_no_cache_is_shared_between_arms_blocks_and_runs(driver: Driver, server: FakeServer) -> None:
    await driver.run(PrefixCacheWorkload(blocks=2, conversations=1, turns=1))
    salts = {b["cache_salt"] for b in server.bodies if len(b["messages"]) > 1}
    assert salts == {f"{driver.run_id}:{arm}:{block}" for arm in ("prefix-aware", "random") for block in (0, 1)}
    assert server.hits == 0


async def test_the_trace_context_reaches_the_gateway(
    driver: Driver, server: FakeServer, exporter: InMemorySpanExporter
) -> None:
    await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    sent = {h["traceparent"].split("-")[1] for h in server.headers}
    spans = [s for s in exporter.get_finished_spans() if s.name == "chat smol"]
    assert sent == {f"{s.context.trace_id:032x}" for s in spans if s.context}
    assert [s for s in spans if s.parent is not None] == []


async def test_block_spans_carry_the_increase_of_vllms_counters(driver: Driver, exporter: InMemorySpanExporter) -> None:
    await driver.run(PrefixCacheWorkload(blocks=1, conversations=2, turns=2))
    for block in [s for s in exporter.get_finished_spans() if s.name == "llmtrace.scenario.block"]:
        told = attributes(block)
        mine = [
            attributes(s)
            for s in exporter.get_finished_spans()
            if s.name == "chat smol"
            and attributes(s)["llmtrace.scenario.arm"] == told["llmtrace.scenario.arm"]
            and "llmtrace.scenario.warmup" not in attributes(s)
        ]
        assert told["llmtrace.scenario.requests"] == len(mine) == 16
        cached = sum(m["gen_ai.usage.cache_read.input_tokens"] for m in mine)
        assert told["llmtrace.scenario.prefix_cache_hits"] == (cached,)
        assert cached > 0
        assert told["llmtrace.kv_block_size"] == 16


async def test_block_spans_carry_what_only_the_stack_s_configuration_tells(
    driver: Driver, exporter: InMemorySpanExporter
) -> None:
    driver.settings = replace(
        driver.settings, roles={"vllm-0": "decode"}, arm_facts={"random": {"llmtrace.pd.threshold_tokens": 512}}
    )
    await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    blocks = [attributes(s) for s in exporter.get_finished_spans() if s.name == "llmtrace.scenario.block"]
    told = {b["llmtrace.scenario.arm"]: b.get("llmtrace.pd.threshold_tokens") for b in blocks}
    assert told == {"prefix-aware": None, "random": 512}
    assert {b["llmtrace.scenario.server_roles"] for b in blocks} == {("decode",)}


async def test_a_third_arm_gets_the_same_requests(driver: Driver, server: FakeServer) -> None:
    arms = ("a", "b", "c")
    driver.settings = replace(driver.settings, arms=arms, gateways=dict.fromkeys(arms, server.url), concurrency=4)
    workload = PdWorkload(blocks=1, turns=2)
    record = await driver.run(workload)
    assert {arm: len(ids) for arm, ids in record.trace_ids.items()} == dict.fromkeys(arms, workload.size)
    sent = [b for b in server.bodies if "warmup" not in b["cache_salt"]]
    by_arm = {
        arm: sorted(json.dumps(b["messages"]) for b in sent if b["cache_salt"] == f"{driver.run_id}:{arm}:0")
        for arm in arms
    }
    assert by_arm["a"] == by_arm["b"] == by_arm["c"]


async def test_requests_of_the_smoke_test_share_a_cache_within_a_conversation(
    driver: Driver, server: FakeServer, exporter: InMemorySpanExporter
) -> None:
    sent = await send_smoke_requests(driver, smoke_requests())
    assert list(sent.values()) == ["prefix-aware"] * 3 + ["random"] * 3
    cached = [attributes(s).get("gen_ai.usage.cache_read.input_tokens") for s in exporter.get_finished_spans()]
    assert cached == [0, 192, 0] * 2
    # Where the Collector keeps a share of the traces, it keeps these.
    assert all(attributes(s)["llmtrace.sampling.keep"] for s in exporter.get_finished_spans())


async def test_no_text_of_a_prompt_or_an_answer_is_recorded(driver: Driver, exporter: InMemorySpanExporter) -> None:
    await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    recorded = " ".join(s.to_json() for s in exporter.get_finished_spans())
    assert "Good" not in recorded
    assert "ferry" not in recorded


async def test_failures_are_recorded_and_end_the_run_with_a_sentence(
    driver: Driver, server: FakeServer, exporter: InMemorySpanExporter
) -> None:
    server.fail = True
    driver.settings = replace(driver.settings, warmups=0)
    with pytest.raises(
        UserError,
        match=r"8 of 8 requests of run .* failed, the first with InternalServerError .*503.*no endpoint",
    ):
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    failed = [s for s in exporter.get_finished_spans() if s.name == "chat smol"]
    assert {s.status.status_code.name for s in failed} == {"ERROR"}
    assert {attributes(s)["error.type"] for s in failed} == {"InternalServerError"}
    assert not any("no endpoint" in s.to_json() for s in failed)


async def test_a_failed_warm_up_ends_the_run_at_once(driver: Driver, server: FakeServer) -> None:
    server.fail = True
    with pytest.raises(UserError, match=r"a warm-up request failed with InternalServerError .*503.*no endpoint"):
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))
    assert len(server.bodies) == 2


async def test_a_request_that_hangs_is_given_up(driver: Driver, server: FakeServer) -> None:
    server.hang = True
    driver.settings = replace(driver.settings, request_timeout_s=0.2, warmups=0)
    with pytest.raises(UserError, match="Timeout"):
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))


async def test_a_run_is_bounded(driver: Driver, server: FakeServer) -> None:
    server.hang = True
    driver.settings = replace(driver.settings, run_timeout_s=0.3)
    with pytest.raises(UserError, match=r"did not end within 0\.3 s"):
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))


async def test_a_server_without_metrics_is_named(driver: Driver, server: FakeServer) -> None:
    driver.settings = replace(driver.settings, servers={"vllm-7": f"{server.url}/nowhere"}, warmups=0)
    with pytest.raises(UserError, match="vllm-7 does not give its metrics"):
        await driver.run(PrefixCacheWorkload(blocks=1, conversations=1, turns=1))


def test_an_arm_without_a_gateway_is_named() -> None:
    with pytest.raises(UserError, match="no gateway for random, only for prefix-aware"):
        Settings("prefix-cache", "smol", {"prefix-aware": "http://x"}, {}, ("prefix-aware", "random"))


def test_counters_of_several_engines_are_added() -> None:
    found = server_counters(
        "# TYPE vllm:prefix_cache_hits counter\n"
        'vllm:prefix_cache_hits_total{engine="0"} 128.0\nvllm:prefix_cache_hits_total{engine="1"} 256.0\n'
    )
    assert (found.hits, found.queries, found.kv_block_size) == (384, 0, None)
