from __future__ import annotations

from collections import OrderedDict

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from picking import Handle, endpoint

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import ProfileResult, SchedulingResult
from llmtrace.picker.plugins.approx_prefix_cache_producer import (
    ApproxPrefixCacheParameters,
    ApproxPrefixCacheProducer,
)
from llmtrace.picker.prefix_index import PrefixIndex, block_hashes
from llmtrace.picker.prefix_match import PrefixMatch
from llmtrace.picker.request import InferenceRequest


def test_hashes_are_those_of_llm_d() -> None:
    """xxHash64 of block hash and previous hash, little-endian; the first previous one is that of model and salt."""
    first = xxhash.xxh64_intdigest(b"modelsalt")
    block = xxhash.xxh64_intdigest(b"a" * 256)
    expected = xxhash.xxh64_intdigest(block.to_bytes(8, "little") + first.to_bytes(8, "little"))
    assert block_hashes(b"a" * 256, 64, "model", "salt") == [expected]


def test_the_last_block_may_be_short_and_the_number_of_blocks_limited() -> None:
    assert len(block_hashes(b"a" * 260, 64, "m")) == 2
    assert len(block_hashes(b"a" * 2600, 64, "m", max_blocks=3)) == 3
    assert block_hashes(b"", 64, "m") == []


@given(st.binary(max_size=600), st.binary(max_size=600), st.binary(min_size=1, max_size=300))
def test_equal_prefixes_have_equal_hashes_and_only_they(prefix: bytes, rest: bytes, other: bytes) -> None:
    size = 16
    ours, theirs = block_hashes(prefix + rest, size, "m"), block_hashes(prefix + other, size, "m")
    whole = len(prefix) // (size * 4)
    assert ours[:whole] == theirs[:whole]
    for index, (mine, yours) in enumerate(zip(ours, theirs, strict=False), 1):
        end = index * size * 4
        assert (mine == yours) == ((prefix + rest)[:end] == (prefix + other)[:end])


def test_model_and_salt_separate() -> None:
    hashes = {tuple(block_hashes(b"abcd", 64, model, salt)) for model, salt in (("m", ""), ("n", ""), ("m", "s"))}
    assert len(hashes) == 3


def test_the_index_matches_leading_blocks_only() -> None:
    index = PrefixIndex()
    index.add([1, 2, 3], "a", 10)
    index.add([1], "b", 10)
    assert index.match([1, 2, 9, 3]) == {"a": 2, "b": 1}
    assert index.match([9, 1]) == {}
    index.remove("a")
    assert index.match([1, 2]) == {"b": 1}
    index.remove("unknown")


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 12), max_size=8), st.sampled_from("ab"), st.integers(1, 6)), max_size=30)
)
def test_the_index_keeps_the_most_recently_used_blocks(adds: list[tuple[list[int], str, int]]) -> None:
    index, model = PrefixIndex(), {"a": OrderedDict[int, None](), "b": OrderedDict[int, None]()}
    for hashes, name, capacity in adds:
        index.add(hashes, name, capacity)
        for block in hashes:
            model[name].pop(block, None)
            model[name][block] = None
        while len(model[name]) > capacity:
            model[name].popitem(last=False)
    assert len(index) == sum(map(len, model.values()))
    for block in range(13):
        assert set(index.match([block])) == {name for name, blocks in model.items() if block in blocks}


def producer(handle: Handle, **parameters: object) -> ApproxPrefixCacheProducer:
    defaults = {"autoTune": False, "blockSizeTokens": 64}
    made = ApproxPrefixCacheParameters.model_validate({**defaults, **parameters})
    return ApproxPrefixCacheProducer("p", made, handle)


def ask(plugin: ApproxPrefixCacheProducer, prompt: bytes, block_size: int = 0) -> tuple[InferenceRequest, PrefixMatch]:
    request = InferenceRequest(id="r", model="m", prompts=(prompt,))
    plugin.produce(request, [endpoint(0, block_size=block_size)])
    return request, request.data["p"]


def to(target: Endpoint, **others: Endpoint) -> SchedulingResult:
    """Where a request goes, with the endpoints of other profiles."""
    results = {name: ProfileResult([each]) for name, each in (("main", target), *others.items())}
    return SchedulingResult(results, "main")


def test_what_was_sent_to_an_endpoint_is_taken_as_cached_there() -> None:
    handle = Handle()
    plugin, target = producer(handle), endpoint(0)
    request, match = ask(plugin, b"a" * 1000)
    assert (match.blocks, match.total_blocks, match.prompt_tokens) == ({}, 4, 250)
    plugin.scheduled(request, to(target))
    _, match = ask(plugin, b"a" * 512 + b"b" * 512)
    assert match.blocks == {target.id: 2}
    assert (match.tokens(target.id), match.tokens("other")) == (128, 0)
    _, whole = ask(plugin, b"a" * 1000)
    assert whole.tokens(target.id) == 250, "never more than the prompt"


def test_the_prefill_endpoint_has_the_prompt_too() -> None:
    """Source: llm-d-router, approximateprefix/plugin.go, PreRequest: the profile is known by its name prefill."""
    handle = Handle()
    plugin, (decode, prefill, other) = producer(handle), map(endpoint, range(3))
    request, _ = ask(plugin, b"a" * 512)
    plugin.scheduled(request, to(decode, prefill=prefill, encode=other))
    assert ask(plugin, b"a" * 512)[1].blocks == {decode.id: 2, prefill.id: 2}
    labels = {"plugin_name": "p", "plugin_type": "approx-prefix-cache-producer"}
    ratios = handle.metrics.registry.get_sample_value("llm_d_epp_prefix_indexer_hit_ratio_count", labels)
    assert ratios == 1, "the hit ratio is that of the endpoint that gets the request"


def test_an_endpoint_that_leaves_is_forgotten() -> None:
    handle = Handle()
    handle.pool.replace([endpoint(0)])
    plugin = producer(handle)
    request, _ = ask(plugin, b"a" * 256)
    plugin.scheduled(request, to(endpoint(0)))
    handle.pool.replace([])
    assert ask(plugin, b"a" * 256)[1].blocks == {}


@pytest.mark.parametrize(
    ("parameters", "reported", "size"),
    [
        ({"blockSizeTokens": 128}, 0, 128),
        ({"blockSizeTokens": 16}, 0, 64),
        ({"blockSize": 256, "blockSizeTokens": 16}, 0, 256),
        ({"autoTune": True}, 128, 128),
        ({"autoTune": True}, 16, 64),
        ({"autoTune": True}, 0, 64),
    ],
)
def test_block_size(parameters: dict[str, object], reported: int, size: int) -> None:
    assert ask(producer(Handle(), **parameters), b"a", reported)[1].block_size_tokens == size


@pytest.mark.parametrize(
    ("parameters", "blocks"),
    [
        ({}, 40),
        ({"maxPrefixTokensToMatch": 128}, 2),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 3}, 3),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 0}, 40),
        ({"maxPrefixTokensToMatch": 1}, 0),
    ],
)
def test_limits_of_the_match(parameters: dict[str, object], blocks: int) -> None:
    assert ask(producer(Handle(), **parameters), b"a" * 256 * 40)[1].total_blocks == blocks
