"""Publishes KV cache events as vLLM does: a PUB socket, and a ROUTER socket for replays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

TOPIC = b"kv@default/vllm-0@smol"


def stored(
    hashes: Sequence[int | bytes], tokens: Sequence[int], parent: int | bytes | None = None, **fields: Any
) -> dict[str, Any]:
    """An event as vLLM encodes it."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": len(tokens) // len(hashes),
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return {**event, **fields}


def removed(*hashes: int | bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0, **fields}


CLEARED = {"type": "AllBlocksCleared"}


def payload(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1795570292.5, events, 0])


def frames(sequence: int, *events: Any, topic: bytes = TOPIC) -> list[bytes]:
    return [topic, sequence.to_bytes(8, "big"), payload(*events)]


class Publisher:
    """A server's publisher. ``lost`` numbers are kept for replays and not sent; ``kept`` limits the replays."""

    def __init__(self, context: zmq.asyncio.Context, port: int = 0, replay_port: int = 0, *, kept: int = 1000) -> None:
        self._pub = context.socket(zmq.XPUB)
        self._pub.xpub_verbose = 1
        self.port = _bind(self._pub, port)
        self._router = context.socket(zmq.ROUTER)
        self.replay_port = _bind(self._router, replay_port)
        self.replays: list[int] = []
        self._buffer: list[list[bytes]] = []
        self._kept = kept
        self._sequence = -1
        self._serving = asyncio.create_task(self._serve())

    async def subscribed(self) -> None:
        """Wait for a subscriber, who then misses nothing."""
        async with asyncio.timeout(10):
            assert (await self._pub.recv())[:1] == b"\x01"

    async def publish(self, *events: Any, lost: bool = False) -> None:
        self._sequence += 1
        message = frames(self._sequence, *events)
        self._buffer = [*self._buffer, message][-self._kept :]
        if not lost:
            await self._pub.send_multipart(message)

    async def send(self, *raw: bytes) -> None:
        """Any frames."""
        await self._pub.send_multipart(raw)

    async def _serve(self) -> None:
        while True:
            identity, _, start = await self._router.recv_multipart()
            self.replays.append(int.from_bytes(start, "big"))
            for message in self._buffer:
                if message[1] >= start:
                    await self._router.send_multipart([identity, b"", *message])
            await self._router.send_multipart([identity, b"", b"", b"\xff" * 8, b""])

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._pub.close(linger=0)
        self._router.close(linger=0)


def _bind(socket: zmq.asyncio.Socket, port: int) -> int:
    """Bind to a port, which another socket of this process may be about to leave; 0 takes a free one."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        except zmq.ZMQError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return int(socket.last_endpoint.decode().rpartition(":")[2])
