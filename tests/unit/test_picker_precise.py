from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kv_publisher import CLEARED, TOPIC, frames, removed, stored
from picking import PREFIX_AWARE, Handle, Picker, chat, endpoint, headers_set, request_body, request_headers
from pydantic import ValidationError
from test_picker_tokens import Renderer, renderer  # noqa: F401 - a fixture
from test_semconv_senders import findings

from llmtrace.errors import UserError
from llmtrace.picker import config
from llmtrace.picker.exchange import Exchange
from llmtrace.picker.kv_events import parse
from llmtrace.picker.kv_subscription import Source
from llmtrace.picker.plugins import precise_prefix_cache_producer
from llmtrace.picker.plugins.precise_prefix_cache_producer import (
    PrecisePrefixCacheParameters,
    PrecisePrefixCacheProducer,
)
from llmtrace.semconv import attributes as a

PRECISE: dict[str, Any] = {
    **PREFIX_AWARE,
    "plugins": [
        PREFIX_AWARE["plugins"][0],
        {"type": "token-producer", "parameters": {"modelName": "smol"}},
        {
            "type": "precise-prefix-cache-producer",
            "parameters": {
                "tokenProcessorConfig": {"blockSizeTokens": 4},
                "indexerConfig": {"kvBlockIndexConfig": {"enableMetrics": True}},
            },
        },
        {
            "type": "prefix-cache-scorer",
            "parameters": {"prefixMatchInfoProducerName": "precise-prefix-cache-producer"},
        },
        *PREFIX_AWARE["plugins"][3:],
    ],
}
ZERO, ONE = "default/vllm-0", "default/vllm-1"


def producer(picker: Picker) -> PrecisePrefixCacheProducer:
    (found,) = picker.configuration.producers
    assert isinstance(found, PrecisePrefixCacheProducer)
    return found


def tell(picker: Picker, server: str, *events: Any, topic: bytes = TOPIC) -> None:
    producer(picker).apply(server, parse(frames(0, *events, topic=topic)))


def ask(picker: Picker, prompt: Any, **fields: Any) -> str:
    """Route a completion; returns the destination."""
    exchange = picker.exchange()
    exchange.handle(request_headers(**{":path": "/v1/completions"}))
    body = json.dumps({"model": "smol", "prompt": prompt, **fields}).encode()
    routed, *_ = exchange.handle(request_body(body))
    exchange.close(cancelled=True)
    return headers_set(routed)[a.DESTINATION_HEADER]


def scorer(picker: Picker) -> dict[str, Any]:
    return dict(picker.span("llm_d.epp.scorer.prefix-cache-scorer").attributes)


def test_requests_go_where_their_blocks_are(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    tell(picker, ONE, stored([1, 2, 3], range(12)))
    tell(picker, ZERO, stored([1], range(4)))
    assert ask(picker, list(range(14))) == "10.0.0.2:8000"
    found = scorer(picker)
    assert found["llmtrace.scorer.endpoints"] == [ZERO, ONE]
    assert found["llmtrace.scorer.scores"] == [1 / 3, 1.0]
    assert found["llmtrace.prefix.match_tokens"] == [4, 12]
    assert found["llmtrace.prefix.prompt_tokens"] == 14


def test_spans_are_llm_ds(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    tell(picker, ONE, stored([1, 2, 3], range(12)), removed(3))
    ask(picker, list(range(13)))
    produced, lookup = picker.span("produce_precise_prefix_cache"), picker.span("index_lookup")
    assert produced.scope == "llm-d-router/pkg/epp/framework/plugins/requestcontrol"
    assert produced.attributes == {
        "llm_d.epp.producer.candidate_endpoints": 2,
        "gen_ai.request.model": "smol",
        "gen_ai.request.id": "r1",
        "llm_d.epp.producer.total_blocks": 3,
        "llm_d.epp.producer.max_match_blocks": 2,
    }
    assert produced.parent_id == picker.span("gateway.request_orchestration").span_id
    assert lookup.scope == "llm-d-router/pkg/kvcache/kvblock"
    assert lookup.attributes == {
        "llm_d.kv_cache.index.lookup.block_count": 3,
        "llm_d.kv_cache.lookup.pod_filter_count": 2,
        "llm_d.kv_cache.lookup.cache_hit": True,
        "llm_d.kv_cache.lookup.blocks_found": 2,
    }
    assert lookup.parent_id == produced.span_id
    add, evict = picker.span("index_add"), picker.span("index_evict")
    assert add.attributes == {
        "llm_d.kv_cache.index.add.engine_key_count": 3,
        "llm_d.kv_cache.index.add.request_key_count": 3,
        "llm_d.kv_cache.index.add.pod_entry_count": 1,
        "llm_d.kv_cache.index.add.device_tier_count": 1,
        "llmtrace.endpoint.name": ONE,
    }
    assert evict.attributes == {
        "llm_d.kv_cache.index.evict.key_type": "engine",
        "llm_d.kv_cache.index.evict.pod_entry_count": 1,
        "llm_d.kv_cache.index.evict.device_tier_count": 1,
        "llmtrace.endpoint.name": ONE,
    }
    assert len({add.trace_id, evict.trace_id, produced.trace_id}) == 3
    assert add.parent_id is None
    assert findings(picker.spans, a.PICKER_SERVICE) == []


def test_a_message_that_changes_nothing_has_no_span(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    tell(picker, ONE, removed(3), CLEARED, stored([1], range(4), kv_cache_spec_kind="mamba"))
    assert picker.spans == []


def test_without_tokens_there_is_no_data(tmp_path: Path) -> None:
    """The token-producer leaves other requests than chats and completions alone."""
    picker = Picker(tmp_path, PRECISE)
    exchange = picker.exchange()
    exchange.handle(request_headers(**{":path": "/v1/embeddings"}))
    exchange.handle(request_body(json.dumps({"model": "smol", "input": "word " * 40}).encode()))
    exchange.close(cancelled=True)
    assert picker.span("produce_precise_prefix_cache").attributes["llm_d.epp.producer.result"] == "skipped_no_tokens"
    assert "llmtrace.prefix.match_tokens" not in scorer(picker)
    assert scorer(picker)["llmtrace.scorer.scores"] == [0.0, 0.0]
    assert [span.name for span in picker.spans if span.name == "index_lookup"] == []
    assert findings(picker.spans, a.PICKER_SERVICE) == []


def test_several_prompts_add_up(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    tell(picker, ONE, stored([1, 2], range(8)), stored([3], range(20, 24)))
    ask(picker, [list(range(10)), list(range(20, 25)), [99]])
    assert scorer(picker)["llmtrace.prefix.match_tokens"] == [0, 12]
    assert scorer(picker)["llmtrace.prefix.prompt_tokens"] == 16
    assert picker.span("produce_precise_prefix_cache").attributes["llm_d.epp.producer.total_blocks"] == 3
    assert len([span for span in picker.spans if span.name == "index_lookup"]) == 3


def test_salts_models_and_topics(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE, endpoints=1)
    tell(picker, ZERO, stored([1, 2], range(8), extra_keys=[["block-0"], None]))
    tell(picker, ZERO, stored([3], range(4)), topic=b"")
    for fields, tokens in (({"cache_salt": "block-0"}, 8), ({}, 0), ({"cache_salt": "x"}, 0), ({"model": "other"}, 0)):
        picker.memory.ended.clear()
        ask(picker, list(range(9)), **fields)
        assert scorer(picker)["llmtrace.prefix.match_tokens"] == [tokens], fields


def test_endpoints_that_leave_are_forgotten(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    size = {"plugin_name": "precise-prefix-cache-producer", "plugin_type": "precise-prefix-cache-producer"}
    tell(picker, ONE, stored([1, 2], range(8)))
    assert picker.value("llm_d_epp_prefix_indexer_size", **size) == 2
    producer(picker).forget(ONE)
    assert picker.value("llm_d_epp_prefix_indexer_size", **size) == 0


def test_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picker = Picker(tmp_path, PRECISE)
    for _ in range(2):
        tell(picker, ONE, stored([1, 2], range(8)), stored([5], range(4), parent=9), removed(2), removed(2))
    ask(picker, list(range(9)))
    index = "llm_d_epp_kv_cache_index_"
    assert picker.value(f"{index}admissions_total") == 4
    assert picker.value(f"{index}evictions_total") == 2
    assert picker.value(f"{index}lookup_requests_total") == 1
    assert picker.value(f"{index}lookup_hits_total") == 1
    skipped = {"cache_kind": "full_attention", "reason": "unknown_parent"}
    assert picker.value("llm_d_epp_kv_cache_events_stores_skipped_total", **skipped) == 2
    assert caplog.text.count("left out of the index: unknown_parent") == 1
    producer(picker).forget(ONE)
    tell(picker, ONE, stored([5], range(4), parent=9))
    assert caplog.text.count("left out of the index: unknown_parent") == 2, "it started again"
    ratio = {"plugin_name": "precise-prefix-cache-producer", "plugin_type": "precise-prefix-cache-producer"}
    assert picker.value("llm_d_epp_prefix_indexer_hit_ratio_sum", **ratio) == 0.5


def test_index_metrics_are_switched_on(tmp_path: Path) -> None:
    plugins = [{**p, "parameters": {}} if "precise" in p["type"] else p for p in PRECISE["plugins"]]
    picker = Picker(tmp_path, {**PRECISE, "plugins": plugins})
    tell(picker, ONE, stored([1], range(16)))
    ask(picker, list(range(17)))
    assert scorer(picker)["llmtrace.prefix.match_tokens"] == [0, 16], "the default block has 16 tokens"
    assert picker.value("llm_d_epp_kv_cache_index_admissions_total") == 0
    assert picker.value("llm_d_epp_kv_cache_index_lookup_requests_total") == 0


def test_speculative_indexing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(precise_prefix_cache_producer, "time", clock)
    plugins = json.loads(json.dumps(PRECISE["plugins"]))
    plugins[2]["parameters"].update(speculativeIndexing=True, speculativeTTL="500ms")
    picker = Picker(tmp_path, {**PRECISE, "plugins": plugins})
    chosen = ask(picker, list(range(9)))
    clock.monotonic = lambda: 100.4
    picker.memory.ended.clear()
    assert ask(picker, [*range(4), 77, 77]) == chosen
    assert sorted(scorer(picker)["llmtrace.prefix.match_tokens"]) == [0, 4]
    clock.monotonic = lambda: 100.9
    picker.memory.ended.clear()
    ask(picker, list(range(9)))
    assert scorer(picker)["llmtrace.prefix.match_tokens"] == [0, 0]


def test_no_speculation_by_default(tmp_path: Path) -> None:
    picker = Picker(tmp_path, PRECISE)
    ask(picker, list(range(9)))
    picker.memory.ended.clear()
    ask(picker, list(range(9)))
    assert scorer(picker)["llmtrace.prefix.match_tokens"] == [0, 0]


@pytest.mark.parametrize(
    ("labels", "parameters", "source"),
    [
        ({}, {}, Source(ZERO, "tcp://10.0.0.1:5557")),
        (
            {},
            {"socketPort": 6000, "replaySocketPort": 6001},
            Source(ZERO, "tcp://10.0.0.1:6000", "tcp://10.0.0.1:6001"),
        ),
        ({}, {"replaySocketPort": -1}, Source(ZERO, "tcp://10.0.0.1:5557")),
        ({a.KV_EVENTS_LABEL: "tcp://127.0.0.1:18200"}, {}, Source(ZERO, "tcp://127.0.0.1:18200")),
        (
            {a.KV_EVENTS_LABEL: "ipc:///run/vllm-0.kv", a.KV_EVENTS_REPLAY_LABEL: "tcp://127.0.0.1:18201"},
            {"replaySocketPort": 6001},
            Source(ZERO, "ipc:///run/vllm-0.kv", "tcp://127.0.0.1:18201"),
        ),
        ({a.KV_EVENTS_LABEL: "5557"}, {}, None),
        ({a.KV_EVENTS_LABEL: "tcp://10.0.0.1:0"}, {}, None),
        ({a.KV_EVENTS_LABEL: "tcp://10.0.0.1:123456"}, {}, None),
        ({a.KV_EVENTS_REPLAY_LABEL: "udp://10.0.0.1:1"}, {}, None),
    ],
)
def test_where_endpoints_publish(
    labels: dict[str, str], parameters: dict[str, int], source: Source | None, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"kvEventsConfig": {"podDiscoveryConfig": parameters}}
    plugin = PrecisePrefixCacheProducer("p", PrecisePrefixCacheParameters.model_validate(content), Handle())
    server = endpoint(0)
    server.labels = labels
    assert [plugin._source(server) for _ in range(2)] == [source] * 2
    assert caplog.text.count("is no ZMQ address") == (source is None)


def test_parameters() -> None:
    """llm-d's defaults, but for the size of the index."""
    made = PrecisePrefixCacheParameters.model_validate({})
    assert made.token_processor_config.tokens == 16
    assert made.indexer_config.kv_block_index_config.in_memory_config.size == 1_000_000
    assert not made.indexer_config.kv_block_index_config.enable_metrics
    events = made.kv_events_config
    assert (events.topic_filter, events.concurrency, events.engine_type, events.discover_pods) == (
        "kv@",
        4,
        "vllm",
        True,
    )
    assert (events.pod_discovery_config.socket_port, events.pod_discovery_config.replay_socket_port) == (5557, 0)
    assert (made.speculative_indexing, made.speculative_ttl) == (False, 2.0)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [({"blockSize": 64}, 64), ({"blockSizeTokens": 32, "blockSize": 64}, 32), ({"blockSizeTokens": 0}, 16), ({}, 16)],
)
def test_block_size(given: dict[str, int], tokens: int) -> None:
    made = PrecisePrefixCacheParameters.model_validate({"tokenProcessorConfig": {"hashSeed": "42", **given}})
    assert made.token_processor_config.tokens == tokens


@pytest.mark.parametrize(
    "content",
    [
        {"tokenProcessorConfig": {"blockSizeTokens": -1}},
        {"tokenProcessorConfig": {"hashAlgorithm": "cbor-fnv"}},
        {"indexerConfig": {"tokenizersPoolConfig": {}}},
        {"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {}}}},
        {"indexerConfig": {"kvBlockIndexConfig": {"inMemoryConfig": {"size": 0}}}},
        {"kvEventsConfig": {"engineType": "sglang"}},
        {"kvEventsConfig": {"zmqEndpoint": "tcp://*:5557"}},
        {"kvEventsConfig": {"discoverPods": False}},
        {"kvEventsConfig": {"concurrency": 0}},
        {"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 0}}},
        {"kvEventsConfig": {"podDiscoveryConfig": {"replaySocketPort": 70000}}},
        {"speculativeTTL": "2"},
        {"speculativeTtl": "2s"},
    ],
)
def test_parameters_that_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrecisePrefixCacheParameters.model_validate(content)


def load(tmp_path: Path, plugins: list[dict[str, Any]]) -> config.Configuration:
    path = tmp_path / "picker.yaml"
    path.write_text(json.dumps({**PRECISE, "plugins": plugins}))
    return config.load(path, Handle())


def test_it_needs_a_tokenizer(tmp_path: Path) -> None:
    plugins = PRECISE["plugins"]
    with pytest.raises(UserError, match="needs the tokens of prompts: add a plugin of type token-producer"):
        load(tmp_path, [plugin for plugin in plugins if plugin["type"] != "token-producer"])
    with pytest.raises(UserError, match="two token producers, 'token-producer' and 'second'"):
        load(tmp_path, [*plugins, {**plugins[1], "name": "second"}])
    with pytest.raises(UserError, match=r"plugin 'token-producer' .*modelName: is missing"):
        load(tmp_path, [{"type": "token-producer"} if p["type"] == "token-producer" else p for p in plugins])
    bad = {"type": plugins[2]["type"], "parameters": {"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {}}}}}
    with pytest.raises(UserError, match=r"unknown parameter 'redisConfig' at indexerConfig.kvBlockIndexConfig"):
        load(tmp_path, [*plugins[:2], bad, *plugins[3:]])


def deprecated(parameters: dict[str, Any], *more: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the scorer that llm-d deprecates."""
    plugins = [PRECISE["plugins"][0], PRECISE["plugins"][1], *more]
    own = {"type": "precise-prefix-cache-scorer", "parameters": parameters}
    profile = {"name": "default", "plugins": [{"pluginRef": "precise-prefix-cache-scorer", "weight": 2}]}
    return {**PRECISE, "plugins": [*plugins, own], "schedulingProfiles": [profile]}


def test_the_deprecated_scorer_makes_its_producer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picker = Picker(tmp_path, deprecated(PRECISE["plugins"][2]["parameters"]))
    assert "use precise-prefix-cache-producer and prefix-cache-scorer" in caplog.text
    tell(picker, ONE, stored([1, 2, 3], range(12)))
    assert ask(picker, list(range(14))) == "10.0.0.2:8000"
    found = picker.span("llm_d.epp.scorer.precise-prefix-cache-scorer").attributes
    assert found["llmtrace.prefix.match_tokens"] == [0, 12]
    assert findings(picker.spans, a.PICKER_SERVICE) == []


def test_the_deprecated_scorer_reads_from_the_producer_that_is_there(tmp_path: Path) -> None:
    own = {**PRECISE["plugins"][2], "name": "own"}
    picker = Picker(tmp_path, deprecated({}, own))
    tell(picker, ONE, stored([1, 2, 3], range(12)))
    assert ask(picker, list(range(14))) == "10.0.0.2:8000"
    with pytest.raises(UserError, match="there are the producers 'own' and 'second'"):
        Picker(tmp_path, deprecated({}, own, {**own, "name": "second"}))
    content = deprecated({})
    with pytest.raises(UserError, match="needs the tokens of prompts"):
        Picker(tmp_path, {**content, "plugins": [content["plugins"][0], content["plugins"][2]]})


async def test_it_follows_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does beside requests are the subscriptions."""
    picker = Picker(tmp_path, PRECISE)
    running = asyncio.create_task(producer(picker).run())
    try:
        async with asyncio.timeout(10):
            while picker.value("llm_d_epp_kv_cache_events_active_subscribers") != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        tell(picker, ONE, stored([1], range(4)))
        picker.handle.pool.replace([endpoint(0)])
        assert picker.value("llm_d_epp_kv_cache_events_active_subscribers") == 1
        assert len(producer(picker)._index) == 0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def route(picker: Picker, body: bytes) -> Any:
    """The answer to a chat's headers, from an exchange that may wait."""
    exchange = Exchange(picker.services, {})
    await exchange.handle(request_headers())
    routed, *_ = await exchange.handle(request_body(body))
    exchange.close(cancelled=True)
    return routed


async def test_a_chat_waits_for_its_tokens(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    picker = Picker(tmp_path, PRECISE, endpoints=0)
    server = renderer.endpoint
    server.answered_at = time.monotonic()
    picker.handle.pool.replace([server])
    tell(picker, ZERO, stored([1, 2], [ord(char) for char in "abcdefgh"]))
    routed = await route(picker, chat("abcdefghi"))
    assert headers_set(routed)[a.DESTINATION_HEADER] == f"127.0.0.1:{renderer.port}"
    assert scorer(picker)["llmtrace.prefix.match_tokens"] == [8]
    orchestration = picker.span("gateway.request_orchestration")
    asked, produced = (
        picker.span("tokenize_render /v1/chat/completions/render"),
        picker.span("produce_precise_prefix_cache"),
    )
    assert asked.parent_id == orchestration.span_id
    assert orchestration.start_ns <= asked.start_ns <= asked.end_ns <= produced.start_ns
    assert findings(picker.spans, a.PICKER_SERVICE) == []
    timed = {"extension_point": "DataProducer", "plugin_type": "token-producer", "plugin_name": "token-producer"}
    assert picker.value("llm_d_epp_plugin_duration_seconds_count", **timed) == 1
    renderer.status = 403
    await route(picker, chat("something else"))
    assert [s.status for s in picker.spans if s.name == "gateway.request_orchestration"] == ["UNSET", "UNSET"]
    assert findings(picker.spans, a.PICKER_SERVICE) == []


async def test_endpoints_that_leave_meanwhile_get_nothing(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    picker = Picker(tmp_path, PRECISE, endpoints=0)
    server = renderer.endpoint
    server.answered_at = time.monotonic()
    picker.handle.pool.replace([server])
    renderer.release.clear()
    exchange = Exchange(picker.services, {})
    await exchange.handle(request_headers())
    routing = asyncio.create_task(exchange.handle(request_body(chat("x"))))
    async with asyncio.timeout(10):
        while not renderer.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    picker.handle.pool.replace([])
    renderer.release.set()
    (answer,) = await routing
    exchange.close()
    assert answer.immediate_response.status.code == 503


async def test_a_fault_in_the_tokenizer_fails_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picker = Picker(tmp_path, PRECISE, endpoints=1)
    tokenizer = picker.configuration.tokenizer
    assert tokenizer is not None

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tokenizer, "tokenize", broken)
    routed = await route(picker, chat("x"))
    assert headers_set(routed)[a.DESTINATION_HEADER] == "10.0.0.1:8000"
    assert "scheduling failed, any endpoint gets it" in caplog.text
