from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_publisher import CLEARED, TOPIC, frames, payload, removed, stored

from llmtrace.picker.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, MessageError, block_id, parse


def test_a_message() -> None:
    message = parse(frames(7, stored([1, 2], range(8)), removed(1), CLEARED))
    assert (message.sequence, message.model, message.batch.data_parallel_rank) == (7, "smol", 0)
    first, second, third = message.batch.events
    assert isinstance(first, BlockStored)
    assert (first.block_hashes, first.token_ids, first.block_size) == ([1, 2], list(range(8)), 4)
    assert second == BlockRemoved(block_hashes=[1], medium="GPU", group_idx=0)
    assert isinstance(third, AllBlocksCleared)


def test_fields_that_vllm_leaves_out_and_fields_that_are_new() -> None:
    """vLLM leaves out fields at their defaults; a later one may send more."""
    least = {"type": "BlockStored", "block_hashes": [b"x" * 32], "parent_block_hash": None, "token_ids": [1]}
    event = parse(frames(0, {**least, "block_size": 1, "lora_id": None, "medium": None, "new": [1]})).batch.events[0]
    assert isinstance(event, BlockStored)
    assert (event.block_hashes, event.extra_keys, event.group_idx) == ([b"x" * 32], None, None)


@pytest.mark.parametrize(
    ("topic", "model"),
    [(b"kv@10.0.0.1@smol", "smol"), (b"", ""), (b"kv@smol", ""), (b"kv@a@b@c", ""), (b"kv@a@\xff", "\ufffd")],
)
def test_the_model_is_in_the_topic(topic: bytes, model: str) -> None:
    assert parse(frames(0, CLEARED, topic=topic)).model == model


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ([], "0 frames"),
        ([TOPIC, b"\0" * 8], "2 frames"),
        ([TOPIC, b"\0" * 7, payload()], "7 bytes"),
        ([TOPIC, b"\0" * 8, b""], "no batch"),
        ([TOPIC, b"\0" * 8, b"\xc1"], "no batch"),
        ([TOPIC, b"\0" * 8, payload() + b"\0"], "no batch"),
        ([TOPIC, b"\0" * 8, msgspec.msgpack.encode({"ts": 1.0, "events": []})], "no batch"),
        (frames(0, {"type": "Strange"}), "no batch"),
        (frames(0, removed("text")), "no batch"),
        (frames(0, stored([1], [-1])), "no batch"),
        (frames(0, stored([1], [1 << 32])), "no batch"),
        (frames(0, stored([1], [1], group_idx="0")), "no batch"),
    ],
)
def test_anything_else_is_refused(raw: list[bytes], complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        parse(raw)


def test_the_complaint_shows_no_content() -> None:
    with pytest.raises(MessageError) as caught:
        parse(frames(0, stored([1], [1], lora_name=5, extra_keys=[["secret"]])))
    assert "secret" not in str(caught.value)


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_no_bytes_do_more_than_be_refused(raw: list[bytes]) -> None:
    with pytest.raises(MessageError):
        parse(raw)


values = st.recursive(
    st.none() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=3) | st.binary(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "block_hashes"]), inner),
    max_leaves=8,
)
FIELDS = ("block_hashes", "token_ids", "block_size", "extra_keys", "group_idx", "medium", "lora_name")


@given(st.sampled_from(FIELDS), values)
def test_no_value_of_a_field_does(field: str, value: Any) -> None:
    event = {**stored([1], [1]), field: value}
    with suppress(MessageError):
        parse(frames(0, event))


@given(st.binary(min_size=8, max_size=32))
def test_a_blocks_number_is_the_end_of_its_hash(value: bytes) -> None:
    whole = int.from_bytes(value, "big")
    assert block_id(value) == block_id(whole) == whole % (1 << 64)
