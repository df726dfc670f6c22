"""What the precise prefix cache predicts, against what a real vLLM takes from its cache, request by request.

One server of its own with a KV cache of 23 blocks, so that it evicts all the time; the picker's plugins run here.
Predicted and real numbers are equal for every request that is alone at the server. Of two that are there at once, the
second may find blocks that the first one is still making: those requests are sent, but not predicted.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_servers import BLOCK_SIZE, MODEL, ModelServer, serving
from loopback import receiving
from opentelemetry.sdk.trace import TracerProvider

from llmtrace.picker.endpoints import Endpoint, Pool
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.plugins.precise_prefix_cache_producer import (
    PrecisePrefixCacheParameters,
    PrecisePrefixCacheProducer,
)
from llmtrace.picker.plugins.token_producer import TokenProducer, TokenProducerParameters
from llmtrace.picker.prefix_match import prefix_match
from llmtrace.picker.request import parse
from llmtrace.semconv import attributes as a
from llmtrace.spans import Tracer
from llmtrace.stack import cache_home

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

BLOCKS = 24
"""One of them is vLLM's own."""
WAIT_S = 20.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SERVER = "default/vllm"


@dataclass(frozen=True)
class Server:
    """A model server, and the labels that say where it publishes its events."""

    port: int
    labels: dict[str, str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    models = sorted(cache_home().glob("model/SmolLM2-135M-Instruct-*[0-9]"))
    if not models:
        pytest.fail(f"no SmolLM2-135M-Instruct under {cache_home()}/model: `llmtrace up` prepares it")
    with tempfile.TemporaryDirectory(prefix="llmtrace-kv-") as folder, receiving() as receiver:
        labels = {a.KV_EVENTS_LABEL: f"ipc://{folder}/kv", a.KV_EVENTS_REPLAY_LABEL: f"ipc://{folder}/kv-replay"}
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": labels[a.KV_EVENTS_LABEL],
            "replay_endpoint": labels[a.KV_EVENTS_REPLAY_LABEL],
            "topic": f"kv@{SERVER}@{MODEL}",
        }
        started = ModelServer(
            Path(folder),
            receiver,
            *("--max-model-len", "640", "--num-gpu-blocks-override", str(BLOCKS), "--gpu-memory-utilization", "0.15"),
            *("--enable-scale-out", "--kv-events-config", json.dumps(events)),
            environment={"VLLM_SERVER_DEV_MODE": "1"},  # for /reset_prefix_cache
            model=models[-1],
        )
        with serving(started):
            yield Server(started.port, labels)


class Picker:
    """The picker's plugins for one endpoint, and requests to it."""

    def __init__(self, server: Server) -> None:
        self.pool = Pool("pool")
        self.metrics = Metrics(self.pool)
        self.tracer = Tracer(TracerProvider(), None, "test")
        self.endpoint = Endpoint("vllm", "default", "127.0.0.1", str(server.port), server.labels)
        self.pool.replace([self.endpoint])
        self.tokenizer = TokenProducer("t", TokenProducerParameters.model_validate({"modelName": MODEL}), self)
        parameters = {
            "tokenProcessorConfig": {"blockSizeTokens": BLOCK_SIZE},
            "indexerConfig": {"kvBlockIndexConfig": {"enableMetrics": True}},
        }
        self.producer = PrecisePrefixCacheProducer("p", PrecisePrefixCacheParameters.model_validate(parameters), self)
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}", timeout=60, trust_env=False, limits=httpx.Limits()
        )
        self._barriers = 0

    async def predict(self, path: str, body: dict[str, Any]) -> tuple[int, int]:
        """Tokens of the prompt, and those that are cached."""
        request = parse("r", {":path": path}, json.dumps({"model": MODEL, **body}).encode())
        await self.tokenizer.tokenize(request, [self.endpoint])
        self.producer.produce(request, [self.endpoint])
        match = prefix_match(request, "p")
        assert match is not None, "the tokens are known"
        return match.prompt_tokens, match.tokens(self.endpoint.id)

    async def serve(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The usage and text of a real answer."""
        response = await self.client.post(path, json={"model": MODEL, "temperature": 0, **body})
        assert response.status_code == httpx.codes.OK, response.text
        found: dict[str, Any] = response.json()
        return found

    async def check(self, path: str, **body: Any) -> int:
        """Predict, serve, compare; returns the cached tokens."""
        predicted = await self.predict(path, body)
        usage = (await self.serve(path, body))["usage"]
        assert predicted == (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]), (path, body)
        await self.settle()
        return predicted[1]

    async def settle(self) -> None:
        """Wait until all events of the requests so far have come: those of one more request come after them."""
        self._barriers += 1
        body = {"prompt": [self._barriers] * (BLOCK_SIZE + 1), "max_tokens": 1, "cache_salt": "barrier"}
        await self.serve(COMPLETIONS, body)
        async with asyncio.timeout(WAIT_S):
            while (await self.predict(COMPLETIONS, body))[1] != BLOCK_SIZE:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def picking(server: Server) -> AsyncIterator[Picker]:
    picker = Picker(server)
    running = [asyncio.create_task(plugin.run()) for plugin in (picker.tokenizer, picker.producer)]
    try:
        await picker.client.post("/reset_prefix_cache")
        async with asyncio.timeout(WAIT_S):
            await picker.settle()
        yield picker
        for name in ("missed", "dropped"):
            assert picker.value(f"llmtrace_kv_cache_events_{name}_total", pod_identifier=SERVER) == 0
    finally:
        await picker.client.aclose()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def words(seed: int, count: int) -> str:
    """Text of about ``count`` tokens."""
    dice = random.Random(seed)
    return " ".join(dice.choice(("harbour", "light", "boat", "keeper", "wind", "stone")) for _ in range(count))


def chat(system: str, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}]
    messages += [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return {"messages": messages, "max_tokens": 6}


async def test_salts_templates_and_kinds_of_prompts(server: Server) -> None:
    async with picking(server) as picker:
        system = words(1, 80)
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?")) == 0
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?")) >= 2 * BLOCK_SIZE
        assert await picker.check(CHAT, **chat(system, "Whose boat is it?")) >= 2 * BLOCK_SIZE
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?"), cache_salt="block-0") == 0
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?"), cache_salt="block-0") >= 2 * BLOCK_SIZE
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?"), cache_salt="block-1") == 0
        assert await picker.check(CHAT, **chat(system, "Who keeps the light?")) >= 2 * BLOCK_SIZE
    async with picking(server) as picker:
        exact = list(range(1000, 1000 + 4 * BLOCK_SIZE))
        assert await picker.check(COMPLETIONS, prompt=exact, max_tokens=2) == 0
        assert await picker.check(COMPLETIONS, prompt=exact, max_tokens=2) == 3 * BLOCK_SIZE, (
            "its last token is computed"
        )
        assert await picker.check(COMPLETIONS, prompt=[*exact, 5], max_tokens=2) == 4 * BLOCK_SIZE
        assert await picker.check(COMPLETIONS, prompt=exact[:40], max_tokens=2) == BLOCK_SIZE
        assert await picker.check(COMPLETIONS, prompt=words(2, 100), max_tokens=2) == 0
        assert await picker.check(COMPLETIONS, prompt=words(2, 100), max_tokens=2) >= 2 * BLOCK_SIZE


async def test_answers_are_cached_too(server: Server) -> None:
    """A conversation goes on: the blocks of the answer were made by decoding."""
    async with picking(server) as picker:
        prompt = [int(token) for token in range(2000, 2000 + 2 * BLOCK_SIZE + 20)]
        body = {"prompt": prompt, "max_tokens": 50, "ignore_eos": True, "return_token_ids": True}
        answer = (await picker.serve(COMPLETIONS, body))["choices"][0]["token_ids"]
        await picker.settle()
        assert len(answer) == 50
        assert await picker.check(COMPLETIONS, prompt=[*prompt, *answer, 7, 7], max_tokens=2) == 4 * BLOCK_SIZE
        first = chat(words(3, 60), "Tell me about the wind.")
        told = (await picker.serve(CHAT, first))["choices"][0]["message"]["content"]
        await picker.settle()
        assert await picker.check(CHAT, **chat(words(3, 60), "Tell me about the wind.", told, "And the stone?")) > 0


async def test_evictions_duplicates_and_resets(server: Server) -> None:
    """More prompts than the cache holds, some of them twice at once, in an order that looks random."""
    async with picking(server) as picker:
        dice = random.Random(7)
        prompts = [[3000 + n] * (BLOCK_SIZE * dice.randrange(2, 5)) for n in range(3)]
        cached = []
        for step in range(30):
            tokens = [*dice.choice(prompts), *[dice.randrange(2)] * dice.choice((0, 1, 40))]
            salt = {"cache_salt": "s"} if dice.random() < 0.3 else {}
            body = {"prompt": tokens, "max_tokens": dice.choice((1, 8)), "ignore_eos": True, **salt}
            if step % 9 == 8:
                await asyncio.gather(picker.serve(COMPLETIONS, body), picker.serve(COMPLETIONS, body))
                await picker.settle()
            if step == 20:
                assert (await picker.client.post("/reset_prefix_cache")).status_code == httpx.codes.OK
                await picker.settle()
            cached.append(await picker.check(COMPLETIONS, **body))
        index = "llm_d_epp_kv_cache_index_"
        assert len({tokens for tokens in cached if tokens}) >= 3, cached
        assert sum(tokens == 0 for tokens in cached) >= 5, cached
        evicted = picker.value(f"{index}evictions_total")
        assert evicted is not None
        assert evicted > 2 * BLOCKS
        held = picker.value("llm_d_epp_prefix_indexer_size", plugin_name="p", plugin_type=picker.producer.type)
        assert held is not None
        assert 0 < held < BLOCKS


async def test_a_picker_that_comes_late_knows_all_by_a_replay(server: Server) -> None:
    async with picking(server) as picker:
        prompt = [4000] * (3 * BLOCK_SIZE + 1)
        await picker.check(COMPLETIONS, prompt=prompt, max_tokens=1)
        late = Picker(server)
        running = asyncio.create_task(late.producer.run())
        try:
            async with asyncio.timeout(WAIT_S):
                while (await late.predict(COMPLETIONS, {"prompt": prompt}))[1] != 3 * BLOCK_SIZE:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert len(late.producer._index) == len(picker.producer._index)
            assert late.value("llmtrace_kv_cache_events_missed_total", pod_identifier=SERVER) == 0
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await late.client.aclose()
