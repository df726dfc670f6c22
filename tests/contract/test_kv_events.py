"""vLLM's KV cache events, and what the picker makes of them, against vLLM's own classes.

``recorded/vllm_kv_cache_0.32.0.json`` is what ``vllm_kv_cache.py`` printed under vLLM 0.32.0: a course of requests
through vLLM's KV cache manager, with duplicates, evictions, resets, salts and a LoRA adapter.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm_scripts import HERE, VERSION, needs_vllm, printed

from llmtrace.picker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Message, block_id, parse
from llmtrace.picker.kv_index import KVBlockIndex
from llmtrace.picker.request import token_bytes

RECORDED: dict[str, Any] = json.loads((HERE / "recorded" / f"vllm_kv_cache_{VERSION}.json").read_text())
BLOCK_SIZE: int = RECORDED["block_size"]
MODEL = "base"
TOPIC = b"kv@default/vllm-0@base"


def message(step: int) -> Message | None:
    batch = RECORDED["steps"][step]["batch"]
    return parse([TOPIC, step.to_bytes(8, "big"), bytes.fromhex(batch)]) if batch else None


MESSAGES = [found for step in range(len(RECORDED["steps"])) if (found := message(step)) is not None]


@pytest.mark.timeout(240)
@needs_vllm
def test_the_recording_is_what_vllm_does(tmp_path: Path) -> None:
    assert printed("vllm_kv_cache.py", tmp_path) == RECORDED


def test_the_recording_has_what_it_is_for() -> None:
    kinds = Counter(type(event).__name__ for told in MESSAGES for event in told.batch.events)
    assert kinds["BlockStored"] > 50
    assert kinds["BlockRemoved"] > 30
    assert kinds["AllBlocksCleared"] == 2
    probes = [probe for step in RECORDED["steps"] for probe in step["probes"]]
    for of in ({"salt": ""}, {"salt": "salt-a"}, {"model": "adapter"}):
        cached = [p["cached"] for p in probes if of.items() <= p.items()]
        assert 0 in cached, of
        assert max(cached) >= 2 * BLOCK_SIZE, of
    held: Counter[int] = Counter()
    most = 0
    for told in MESSAGES:
        for event in told.batch.events:
            if isinstance(event, BlockStored):
                held.update(map(block_id, event.block_hashes))
            elif isinstance(event, BlockRemoved):
                held.subtract(map(block_id, event.block_hashes))
            else:
                held.clear()
            most = max(most, *held.values(), 0)
    assert most > 1, "vLLM held some block twice"


def test_fields_of_events() -> None:
    told = MESSAGES[-1]
    assert (told.model, told.batch.ts, told.batch.data_parallel_rank) == (MODEL, 1795570292.5, 0)
    assert [told.sequence for told in MESSAGES] == [n for n, step in enumerate(RECORDED["steps"]) if step["batch"]]
    stored = [e for told in MESSAGES for e in told.batch.events if isinstance(e, BlockStored)]
    for event in stored:
        assert len(event.token_ids) == event.block_size * len(event.block_hashes)
        assert event.block_size == BLOCK_SIZE
        assert (event.medium, event.group_idx, event.kv_cache_spec_kind) == ("GPU", 0, "full_attention")
        assert event.extra_keys is not None
        assert len(event.extra_keys) == len(event.block_hashes)
        assert (event.locality, event.ownership, event.session_id) == (None, None, None)
    assert {event.lora_name for event in stored} == {None, "adapter"}
    assert {event.lora_id for event in stored} == {None, 1}
    assert any(event.parent_block_hash is not None for event in stored)
    keys = [keys for event in stored for keys in event.extra_keys or ()]
    for expected in (None, ["salt-a"], ["adapter"], ["adapter", "salt-a"]):
        assert expected in keys, expected
    removed = [e for told in MESSAGES for e in told.batch.events if isinstance(e, BlockRemoved)]
    assert all((e.medium, e.group_idx, len(e.block_hashes)) == ("GPU", 0, 1) for e in removed)
    assert any(isinstance(e, AllBlocksCleared) for told in MESSAGES for e in told.batch.events)


@pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE // 2, 1])
def test_the_index_predicts_what_vllm_takes_from_its_cache(size: int) -> None:
    """With blocks of vLLM's size, and with smaller ones of the picker's own."""
    index = KVBlockIndex(size)
    for step, told in enumerate(RECORDED["steps"]):
        found = message(step)
        if found is not None:
            assert index.apply("vllm-0", found.model, found.batch).skipped == {}
        for probe in told["probes"]:
            keys = index.keys(token_bytes(probe["tokens"]), probe["model"], probe["salt"])
            blocks = index.match(keys, len(probe["tokens"]), ["vllm-0"], 0.0).get("vllm-0", 0)
            assert blocks * size == probe["cached"], (step, probe)


def test_keys_are_equal_where_vllms_hashes_are() -> None:
    index = KVBlockIndex(BLOCK_SIZE)
    pairs = set()
    for prompt in RECORDED["hashes"]:
        keys = index.keys(token_bytes(prompt["tokens"]), prompt["model"], prompt["salt"])
        pairs.update(zip(keys, (form[0] for form in prompt["hashes"]), strict=True))
    assert len(pairs) > 20
    assert len({key for key, _ in pairs}) == len({hash_ for _, hash_ in pairs}) == len(pairs)


def test_both_forms_of_a_hash_are_one_block() -> None:
    """vLLM sends integers; with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0 the whole hash."""
    for prompt in RECORDED["hashes"]:
        for whole, number in prompt["hashes"]:
            assert block_id(bytes.fromhex(whole)) == block_id(number) == number
