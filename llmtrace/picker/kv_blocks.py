"""Blocks of KV cache: the picker's keys of them, and those that one server holds.

As in llm-d, blocks have keys of the picker's own, made of what the events tell: token ids, model or LoRA adapter, and
cache salt. A prompt's keys are made in the same way of its token ids. vLLM's own hashes only tell which block an event
means, so its hash function and seed need not be known. Source: llm-d-router, pkg/kvcache/kvblock.
"""

from __future__ import annotations

import struct
from collections import OrderedDict

import xxhash

from llmtrace.picker.kv_events import BlockHash, block_id
from llmtrace.picker.request import BYTES_PER_TOKEN

MEDIA = ("GPU", "CPU", "STORAGE")
"""Where a block may be; the same block may be in several places."""


def root_key(seed: str, model: str, salt: str) -> int:
    """The key before a prompt's first block."""
    texts = [text.encode(errors="surrogatepass") for text in (seed, model, salt)]
    return xxhash.xxh64_intdigest(b"".join(struct.pack("<Q", len(text)) + text for text in texts))


def chain(key: int, tokens: bytes, block_size_tokens: int) -> list[int]:
    """The key of each full block of ``tokens`` (four bytes each); it stands for everything up to the block's end."""
    step = block_size_tokens * BYTES_PER_TOKEN
    keys = []
    for end in range(step, len(tokens) + 1, step):
        key = xxhash.xxh64_intdigest(tokens[end - step : end], key)
        keys.append(key)
    return keys


class ServerBlocks:
    """The blocks of one server: at most ``capacity``, those announced longest ago are forgotten first.

    ``holders`` has the bits of all servers that hold a key; this server's is ``1 << slot``. ``step`` is the server's
    block size in the picker's blocks. A server's block has one key, that of its end: it is cached as a whole or not at
    all.
    """

    def __init__(self, slot: int, holders: dict[int, int], capacity: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.step = 1
        self._holders = holders
        self._capacity = capacity
        self._keys: OrderedDict[int, int] = OrderedDict()
        # vLLM may hold the same block more than once, and then removes it as often. Most have one copy only.
        self._copies: dict[int, int] = {}
        self._more: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, value: BlockHash, group: int) -> int | None:
        """Key of a block, wherever it is."""
        block = block_id(value)
        for medium in range(len(MEDIA)):
            key = self._keys.get(_identity(block, group, medium))
            if key is not None:
                return key
        return None

    def store(self, value: BlockHash, group: int, medium: int, key: int) -> None:
        """The server stored a block."""
        identity = _identity(block_id(value), group, medium)
        if identity in self._keys:
            self._keys.move_to_end(identity)
            self._copies[identity] = self._copies.get(identity, 1) + 1
            return
        self._keys[identity] = key
        self.hold(key)
        if len(self._keys) > self._capacity:
            oldest, key = self._keys.popitem(last=False)
            self._copies.pop(oldest, None)
            self.release(key)

    def remove(self, value: BlockHash, group: int, medium: int) -> bool:
        """The server removed a copy of a block; whether it was the last one."""
        identity = _identity(block_id(value), group, medium)
        copies = self._copies.pop(identity, 1) - 1
        if copies:
            if copies > 1:
                self._copies[identity] = copies
            return False
        key = self._keys.pop(identity, None)
        if key is None:
            return False
        self.release(key)
        return True

    def clear(self) -> None:
        """The server holds nothing."""
        for key in self._keys.values():
            self.release(key)
        self._keys.clear()
        self._copies.clear()

    def hold(self, key: int) -> None:
        """One more reason to take a key as held."""
        bits = self._holders.get(key, 0)
        if bits & self.bit:
            self._more[key] = self._more.get(key, 0) + 1
        else:
            self._holders[key] = bits | self.bit

    def release(self, key: int) -> None:
        """One reason less."""
        more = self._more.pop(key, 0)
        if more > 1:
            self._more[key] = more - 1
        elif not more:
            bits = self._holders[key] & ~self.bit
            if bits:
                self._holders[key] = bits
            else:
                del self._holders[key]


def _identity(block: int, group: int, medium: int) -> int:
    """A block in a place, as a number; that of group 0 on a GPU is its hash."""
    return block | group << 64 | medium << 80
