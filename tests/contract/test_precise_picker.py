"""The picker as a process that follows KV caches: its loop, its subscriptions and its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq.asyncio

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from kv_publisher import CLEARED, Publisher, stored
from test_picker_precise import PRECISE
from test_picker_server import EXIT_S, exporting_to, gateway_of, model_servers, receiving, running, trace_id
from test_picker_tokens import Renderer

from llmtrace.semconv import attributes as a

PROMPT = "abcdefghijklm"
RENDER = f"{a.RENDER_SPAN_PREFIX}/v1/chat/completions/render"


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    made = Renderer()
    yield made
    made.close()


async def test_requests_follow_the_events(tmp_path: Path, renderer: Renderer) -> None:
    with zmq.asyncio.Context() as context, receiving() as receiver, model_servers(2) as servers:
        publishers = [Publisher(context), Publisher(context)]
        for server, publisher in zip(servers, publishers, strict=True):
            server.labels = {
                a.KV_EVENTS_LABEL: f"tcp://127.0.0.1:{publisher.port}",
                a.KV_EVENTS_REPLAY_LABEL: f"tcp://127.0.0.1:{publisher.replay_port}",
            }
        tokens = {"modelName": "smol", "vllm": {"url": f"http://127.0.0.1:{renderer.port}"}}
        plugins = [{**p, "parameters": tokens} if p["type"] == "token-producer" else p for p in PRECISE["plugins"]]
        try:
            with running(tmp_path, servers, {**PRECISE, "plugins": plugins}, **exporting_to(receiver)) as picker:
                for publisher in publishers:
                    await publisher.subscribed()
                async with gateway_of(picker) as gateway:
                    for warm, publisher in zip(servers, publishers, strict=True):
                        for other in publishers:
                            await other.publish(CLEARED)
                        await publisher.publish(stored([1, 2, 3], [ord(char) for char in PROMPT[:12]]))
                        await gateway.exchange_until(warm.address, PROMPT)
                    assert await gateway.exchange(0xF1, PROMPT) == servers[1].address
                assert picker.value("llm_d_epp_kv_cache_events_active_subscribers") == 2
                assert picker.value("llmtrace_kv_cache_events_dropped_total") == 0
                picker.process.terminate()
                assert picker.process.wait(EXIT_S) == 0, picker.log.read_text()
                assert "Traceback" not in picker.log.read_text()
            names = {span.name for span in receiver.of(trace_id(0xF1))}
            assert {"produce_precise_prefix_cache", "index_lookup"} <= names
            assert RENDER not in names, "these tokens were known"
        finally:
            for publisher in publishers:
                await publisher.close()
