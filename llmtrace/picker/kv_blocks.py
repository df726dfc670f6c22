"""Which server holds which blocks of KV cache, as its events tell, and so how much of a prompt it has cached.

As in llm-d, blocks have keys of the picker's own, made of what the events tell: token ids, model or LoRA adapter, and
cache salt. A prompt's keys are made in the same way of its token ids. vLLM's own hashes only tell which block an event
means, so its hash function and seed need not be known. Source: llm-d-router, pkg/kvcache/kvblock and pkg/kvevents.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from llmtrace.picker.kv_events import AllBlocksCleared, Batch, BlockHash, BlockRemoved, BlockStored, block_id
from llmtrace.picker.request import BYTES_PER_TOKEN, token_bytes

MEDIA = ("GPU", "CPU", "STORAGE")
"""Where a block may be; the same block may be in several places."""
REMOTE = "REMOTE"
MAX_GROUPS = 1 << 16
KINDS = ("full_attention", "mla_attention", "sink_full_attention")
"""KV cache groups in which a prefix is cached as long as all its blocks are; llm-d indexes no others."""
OTHER_KINDS = (
    *("sliding_window", "sliding_window_mla", "mamba", "chunked_local_attention"),
    *("encoder_only_attention", "cross_attention"),
)


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

    ``step`` is the server's block size in the picker's blocks. A server's block has one key, that of its end: it is
    cached as a whole or not at all.
    """

    def __init__(self, capacity: int) -> None:
        self.step = 1
        self._capacity = capacity
        self._keys: OrderedDict[int, int] = OrderedDict()
        # vLLM may hold the same block more than once, and then removes it as often. Most have one copy only.
        self._copies: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._expected: dict[int, float] = {}

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
        self._held[key] = self._held.get(key, 0) + 1
        if len(self._keys) > self._capacity:
            oldest, key = self._keys.popitem(last=False)
            self._copies.pop(oldest, None)
            self._release(key)

    def remove(self, value: BlockHash, group: int, medium: int) -> bool:
        """The server removed a copy of a block; whether it was the last one."""
        identity = _identity(block_id(value), group, medium)
        copies = self._copies.get(identity, 1) - 1
        if copies:
            if copies == 1:
                del self._copies[identity]
            else:
                self._copies[identity] = copies
            return False
        key = self._keys.pop(identity, None)
        if key is None:
            return False
        self._release(key)
        return True

    def expect(self, keys: Iterable[int], until: float) -> None:
        """The server will soon hold these; forget it at the monotonic time ``until``, in seconds."""
        for key in keys:
            self._expected.pop(key, None)
            self._expected[key] = until

    def matched(self, keys: Sequence[int], now: float) -> int:
        """How many of a prompt's leading blocks the server holds."""
        held, expected, step = self._held, self._expected, self.step
        if expected:
            self._expire(now)
        count = 0
        for position in range(step - 1, len(keys), step):
            if keys[position] not in held and keys[position] not in expected:
                break
            count += step
        return count

    def _expire(self, now: float) -> None:
        while self._expected:
            first = next(iter(self._expected))
            if self._expected[first] > now:
                break
            del self._expected[first]

    def _release(self, key: int) -> None:
        if self._held[key] == 1:
            del self._held[key]
        else:
            self._held[key] -= 1


@dataclass
class Changes:
    """What a batch changed: blocks stored and last copies removed, in the server's blocks.

    ``skipped`` counts events that say nothing about prefixes, by the kind of their KV cache group and the reason.
    """

    stored: int = 0
    removed: int = 0
    media: set[int] = field(default_factory=set)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)


class KVBlockIndex:
    """The blocks of all servers, by server.

    ``block_size_tokens`` is the size of the picker's own blocks; those of a server must be multiples of it.
    ``capacity`` is the number of blocks kept for each server.
    """

    def __init__(self, block_size_tokens: int, seed: str = "", capacity: int = 1_000_000) -> None:
        self.block_size_tokens = block_size_tokens
        self._seed = seed
        self._capacity = capacity
        self._servers: dict[str, ServerBlocks] = {}

    def __len__(self) -> int:
        return sum(map(len, self._servers.values()))

    def keys(self, tokens: bytes, model: str, salt: str) -> list[int]:
        """Keys of a prompt's full blocks; ``tokens`` has four bytes a token."""
        return chain(root_key(self._seed, model, salt), tokens, self.block_size_tokens)

    def match(self, keys: Sequence[int], tokens: int, servers: Iterable[str], now: float) -> Mapping[str, int]:
        """How many of a prompt's leading blocks each server would take from its cache; those without any are left out.

        ``tokens`` is the prompt's length: vLLM computes at least its last token, and with it that token's block.
        """
        matched: dict[str, int] = {}
        for server in servers:
            blocks = self._servers.get(server)
            if blocks is None:
                continue
            usable = (tokens - 1) // self.block_size_tokens // blocks.step * blocks.step
            if count := min(blocks.matched(keys, now), usable):
                matched[server] = count
        return matched

    def apply(self, server: str, model: str, batch: Batch) -> Changes:
        """Take what a server's events tell, in their order. ``model`` is the one that the server serves."""
        changes = Changes()
        for event in batch.events:
            if isinstance(event, BlockStored):
                reason = self._store(self._blocks(server), event, model, changes)
                if reason:
                    cause = _kind(event), reason
                    changes.skipped[cause] = changes.skipped.get(cause, 0) + 1
            elif isinstance(event, BlockRemoved):
                self._remove(server, event, changes)
            elif isinstance(event, AllBlocksCleared):
                changes.removed += self.forget(server)
        return changes

    def expect(self, server: str, keys: Iterable[int], until: float) -> None:
        """The server gets a prompt of these blocks: count on them until its events tell, or the time is over."""
        self._blocks(server).expect(keys, until)

    def forget(self, server: str) -> int:
        """The server holds nothing any more, as far as is known; returns how many blocks are forgotten."""
        blocks = self._servers.pop(server, None)
        return 0 if blocks is None else len(blocks)

    def _blocks(self, server: str) -> ServerBlocks:
        blocks = self._servers.get(server)
        if blocks is None:
            blocks = self._servers[server] = ServerBlocks(self._capacity)
        return blocks

    def _store(self, blocks: ServerBlocks, event: BlockStored, model: str, changes: Changes) -> str:
        """Store what is a prefix; returns why the rest is not, or nothing."""
        medium, group = _medium(event.medium), event.group_idx or 0
        if medium is None or event.locality == REMOTE:
            return "not_on_the_server"
        if _kind(event) not in KINDS or not 0 <= group < MAX_GROUPS:
            return "unsupported_cache_kind"
        changes.media.add(medium)
        if not event.token_ids:
            return self._copy(blocks, event, group, medium, changes)
        if event.block_size * len(event.block_hashes) != len(event.token_ids):
            return "non_dense_block_span"
        step, rest = divmod(event.block_size, self.block_size_tokens)
        if rest or not step or (len(blocks) and step != blocks.step):
            return "block_size"
        blocks.step = step
        parent = event.parent_block_hash
        key = self._root(event, model) if parent is None else blocks.key(parent, group)
        if key is None:
            return "not_text" if parent is None else "unknown_parent"
        tokens = token_bytes(event.token_ids)
        size = event.block_size * BYTES_PER_TOKEN
        for index, value in enumerate(event.block_hashes):
            # The content of a prompt's first block went into its root.
            if (index or parent is not None) and _content(event, index):
                return "not_text"
            key = chain(key, tokens[index * size : (index + 1) * size], self.block_size_tokens)[-1]
            blocks.store(value, group, medium, key)
            changes.stored += 1
        return ""

    def _root(self, event: BlockStored, model: str) -> int | None:
        """The key before a prompt's first block; None where that block holds media or embeddings."""
        content = _content(event, 0)
        salt = content.pop() if content and isinstance(content[-1], str) else ""
        return None if content else root_key(self._seed, event.lora_name or model, str(salt))

    def _copy(self, blocks: ServerBlocks, event: BlockStored, group: int, medium: int, changes: Changes) -> str:
        """Blocks that are known were stored in another place; such an event has no tokens."""
        for value in event.block_hashes:
            key = blocks.key(value, group)
            if key is None:
                return "unknown_block"
            blocks.store(value, group, medium, key)
            changes.stored += 1
        return ""

    def _remove(self, server: str, event: BlockRemoved, changes: Changes) -> None:
        medium, group = _medium(event.medium), event.group_idx or 0
        blocks = self._servers.get(server)
        if blocks is None or medium is None or not 0 <= group < MAX_GROUPS or event.locality == REMOTE:
            return
        changes.media.add(medium)
        for value in event.block_hashes:
            changes.removed += blocks.remove(value, group, medium)


def _identity(block: int, group: int, medium: int) -> int:
    """A block in a place, as a number; that of group 0 on a GPU is its hash."""
    return block | group << 64 | medium << 80


def _medium(name: str | None) -> int | None:
    return MEDIA.index(name) if name in MEDIA else 0 if name is None else None


def _kind(event: BlockStored) -> str:
    """The kind of the event's KV cache group; without groups it is full attention."""
    kind = event.kv_cache_spec_kind
    if kind is None:
        return KINDS[0] if event.group_idx is None else "unknown"
    return kind if kind in KINDS or kind in OTHER_KINDS else "unknown"


def _content(event: BlockStored, index: int) -> list[object]:
    """What tells a block apart beside its tokens and its LoRA adapter: a salt, media, embeddings."""
    keys = event.extra_keys[index] if event.extra_keys and index < len(event.extra_keys) else None
    return list(keys or ())[1:] if event.lora_name else list(keys or ())
