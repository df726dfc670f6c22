"""Which server holds which blocks of KV cache, as its events tell, and so how much of a prompt it has cached.

Source: llm-d-router, pkg/kvcache/kvblock and pkg/kvevents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmtrace.picker.kv_blocks import MEDIA, ServerBlocks, chain, root_key
from llmtrace.picker.kv_events import AllBlocksCleared, Batch, BlockRemoved, BlockStored
from llmtrace.picker.request import BYTES_PER_TOKEN, token_bytes

REMOTE = "REMOTE"
MAX_GROUPS = 1 << 16
KINDS = ("full_attention", "mla_attention", "sink_full_attention")
"""KV cache groups in which a prefix is cached as long as all its blocks are; llm-d indexes no others."""
OTHER_KINDS = (
    *("sliding_window", "sliding_window_mla", "mamba", "chunked_local_attention"),
    *("encoder_only_attention", "cross_attention"),
)


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
        self._holders: dict[int, int] = {}
        self._servers: dict[str, ServerBlocks] = {}
        self._names: list[str] = []
        self._free: list[int] = []
        self._expected: deque[tuple[float, ServerBlocks, Sequence[int]]] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._servers.values()))

    def keys(self, tokens: bytes, model: str, salt: str) -> list[int]:
        """Keys of a prompt's full blocks; ``tokens`` has four bytes a token."""
        return chain(root_key(self._seed, model, salt), tokens, self.block_size_tokens)

    def match(self, keys: Sequence[int], tokens: int, servers: Iterable[str], now: float) -> Mapping[str, int]:
        """How many of a prompt's leading blocks each server would take from its cache; those without any are left out.

        ``tokens`` is the prompt's length: vLLM computes at least its last token, and with it that token's block.
        ``now`` is the monotonic time in seconds.
        """
        self._expire(now)
        usable = (tokens - 1) // self.block_size_tokens
        bits: dict[int, int] = {}
        for server in servers:
            blocks = self._servers.get(server)
            if blocks is not None:
                bits[blocks.step] = bits.get(blocks.step, 0) | blocks.bit
        matched: dict[str, int] = {}
        for step, candidates in bits.items():
            count = 0
            for key in keys[step - 1 : usable : step]:
                left = candidates & self._holders.get(key, 0)
                if left != candidates:
                    self._matched(candidates & ~left, count, matched)
                    candidates = left
                if not left:
                    break
                count += step
            self._matched(candidates, count, matched)
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

    def expect(self, server: str, keys: Sequence[int], until: float) -> None:
        """The server gets a prompt of these blocks: count on them until the monotonic time ``until``, in seconds.

        Expectations are to be given in the order of their times.
        """
        blocks = self._blocks(server)
        for key in keys:
            blocks.hold(key)
        self._expected.append((until, blocks, keys))

    def forget(self, server: str) -> int:
        """The server holds nothing any more, as far as is known; returns how many blocks are forgotten."""
        blocks = self._servers.pop(server, None)
        if blocks is None:
            return 0
        count = len(blocks)
        for _, _, keys in (expected for expected in self._expected if expected[1] is blocks):
            for key in keys:
                blocks.release(key)
        self._expected = deque(expected for expected in self._expected if expected[1] is not blocks)
        blocks.clear()
        self._free.append(blocks.slot)
        return count

    def _expire(self, now: float) -> None:
        while self._expected and self._expected[0][0] <= now:
            _, blocks, keys = self._expected.popleft()
            for key in keys:
                blocks.release(key)

    def _blocks(self, server: str) -> ServerBlocks:
        blocks = self._servers.get(server)
        if blocks is None:
            if self._free:
                slot = self._free.pop()
                self._names[slot] = server
            else:
                slot = len(self._names)
                self._names.append(server)
            blocks = self._servers[server] = ServerBlocks(slot, self._holders, self._capacity)
        return blocks

    def _matched(self, bits: int, count: int, matched: dict[str, int]) -> None:
        """The servers of these bits hold ``count`` leading blocks."""
        while bits and count:
            lowest = bits & -bits
            matched[self._names[lowest.bit_length() - 1]] = count
            bits ^= lowest

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
