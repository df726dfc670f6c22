"""The KV cache events that vLLM publishes: what it stored in its prefix cache, and what it removed.

A message has three ZMQ frames: topic, sequence number (8 bytes, big-endian, from 0 at each start of the server) and a
batch in MessagePack. Source: vLLM 0.32, vllm/distributed/kv_events.py. vLLM sends the topic of its configuration; llm-d
wants it to be ``kv@NAME@MODEL`` (llm-d-router, pkg/kvevents/engineadapter).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

SEQUENCE_BYTES = 8
END_OF_REPLAY = b"\xff" * SEQUENCE_BYTES
"""Sequence frame that ends a replay: -1."""

BlockHash = int | bytes
"""vLLM's hash of a block: bytes, or their last eight as an integer (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)."""
_HASH_BYTES = 8


class MessageError(ValueError):
    """The message is none of vLLM's. Says what is wrong, and never what is in it."""


class BlockStored(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Full blocks of one sequence of tokens were stored.

    ``token_ids`` are those of all blocks, ``block_size`` of each; ``parent_block_hash`` is the block before the first
    one. ``extra_keys`` has an entry for each block: the LoRA adapter's name, ``[identifier, offset]`` of media in the
    block, the cache salt (first block of a prompt only), digests of prompt embeddings (bytes). ``medium`` is where the
    block is (GPU, CPU, STORAGE; none is GPU), ``locality`` whether that is the server's own (LOCAL, REMOTE, unknown),
    ``group_idx`` the KV cache group, of kind ``kv_cache_spec_kind``. ``lora_id`` is deprecated.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[Annotated[int, Meta(ge=0, lt=1 << 32)]]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Blocks left the cache; fields as in :class:`BlockStored`."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True):
    """The prefix cache was reset."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """The events of one engine step. ``ts`` in seconds since the epoch."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


class Message(msgspec.Struct, frozen=True):
    """A message. ``model`` is that of the topic, empty where the topic has none."""

    sequence: int
    model: str
    batch: Batch


_decoder = msgspec.msgpack.Decoder(Batch)


def parse(frames: Sequence[bytes]) -> Message:
    """Read a message; raises MessageError."""
    if len(frames) != 3:
        raise MessageError(f"it has {len(frames)} frames, not 3")
    topic, sequence, payload = frames
    if len(sequence) != SEQUENCE_BYTES:
        raise MessageError(f"its sequence number has {len(sequence)} bytes, not {SEQUENCE_BYTES}")
    try:
        batch = _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(f"its payload is no batch of events as vLLM 0.32 sends them: {error}") from None
    return Message(int.from_bytes(sequence, "big"), _model(topic), batch)


def block_id(value: BlockHash) -> int:
    """A block's hash as a number of 64 bits, the same for both forms of it."""
    return int.from_bytes(value[-_HASH_BYTES:], "big") if isinstance(value, bytes) else value & (1 << 64) - 1


def _model(topic: bytes) -> str:
    parts = topic.decode(errors="replace").split("@")
    return parts[2] if len(parts) == 3 else ""
