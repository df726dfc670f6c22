"""Which endpoint probably has which prefixes of prompts in its KV cache: block hashes, and an LRU index of them.

Source: llm-d-router, prefixhash and approximateprefix. The hashes are those of llm-d's EPP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice

import xxhash

from llmtrace.picker.request import BYTES_PER_TOKEN


def block_hashes(
    prompt: bytes, block_size_tokens: int, model: str, cache_salt: str = "", max_blocks: int | None = None
) -> list[int]:
    """Hash of each block of a prompt, chained so that it stands for the whole prefix up to the block's end.

    ``prompt`` has four bytes a token; the last block may be shorter than ``block_size_tokens``.
    """
    previous = xxhash.xxh64_intdigest(model.encode() + cache_salt.encode())
    step = block_size_tokens * BYTES_PER_TOKEN
    hashes: list[int] = []
    starts = range(0, len(prompt), step)
    for start in starts if max_blocks is None else islice(starts, max_blocks):
        block = xxhash.xxh64_intdigest(prompt[start : start + step])
        previous = xxhash.xxh64_intdigest(block.to_bytes(8, "little") + previous.to_bytes(8, "little"))
        hashes.append(previous)
    return hashes


class PrefixIndex:
    """Block hashes by endpoint, the least recently used of each endpoint forgotten beyond its capacity."""

    def __init__(self) -> None:
        self._endpoints: dict[int, set[str]] = {}
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks.values())

    def add(self, hashes: Sequence[int], endpoint: str, capacity: int) -> None:
        """The endpoint now holds these blocks, and at most ``capacity`` in all."""
        blocks = self._blocks.setdefault(endpoint, OrderedDict())
        for block in hashes:
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
                self._endpoints.setdefault(block, set()).add(endpoint)
        while len(blocks) > capacity:
            evicted, _ = blocks.popitem(last=False)
            self._forget(evicted, endpoint)

    def match(self, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many of the leading blocks each endpoint holds; endpoints without any are left out."""
        matched: dict[str, int] = {}
        for block in hashes:
            holders = self._endpoints.get(block)
            if not holders:
                break
            for endpoint in holders:
                matched[endpoint] = matched.get(endpoint, 0) + 1
        return matched

    def remove(self, endpoint: str) -> None:
        """Forget an endpoint."""
        for block in self._blocks.pop(endpoint, ()):
            self._forget(block, endpoint)

    def _forget(self, block: int, endpoint: str) -> None:
        holders = self._endpoints[block]
        holders.discard(endpoint)
        if not holders:
            del self._endpoints[block]
