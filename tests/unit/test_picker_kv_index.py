from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kv_publisher import CLEARED, frames, removed, stored

from llmtrace.picker.kv_blocks import chain, root_key
from llmtrace.picker.kv_events import parse
from llmtrace.picker.kv_index import Changes, KVBlockIndex
from llmtrace.picker.request import token_bytes

SIZE = 2
MODEL = "smol"


def apply(index: KVBlockIndex, *events: Any, server: str = "a") -> Changes:
    return index.apply(server, MODEL, parse(frames(0, *events)).batch)


def match(index: KVBlockIndex, tokens: list[int], model: str = MODEL, salt: str = "", now: float = 0.0) -> Any:
    """Blocks by server, of a prompt that has one token more."""
    keys = index.keys(token_bytes([*tokens, 0]), model, salt)
    return dict(index.match(keys, len(tokens) + 1, ["a", "b"], now))


def test_keys_tell_prefixes_apart() -> None:
    root = root_key("", MODEL, "")
    keys = chain(root, token_bytes([1, 2, 3, 4, 5]), SIZE)
    assert len(keys) == 2, "full blocks only"
    assert chain(keys[0], token_bytes([3, 4]), SIZE) == keys[1:], "a chain goes on from any of its keys"
    assert chain(root, token_bytes([3, 4]), SIZE) != keys[1:]
    roots = {
        root_key(*texts) for texts in (("", "ab", ""), ("", "a", "b"), ("a", "b", ""), ("", "", "ab"), ("", "", ""))
    }
    assert len(roots) == 5


def test_blocks_are_matched_up_to_the_first_gap() -> None:
    index = KVBlockIndex(SIZE)
    changes = apply(index, stored([10, 20, 30], [1, 2, 3, 4, 5, 6]))
    assert (changes.stored, changes.removed, changes.skipped, changes.media) == (3, 0, {}, {0})
    apply(index, stored([10], [1, 2]), server="b")
    assert match(index, [1, 2, 3, 4, 5, 6]) == {"a": 3, "b": 1}
    assert match(index, [1, 2, 9, 9, 5, 6]) == {"a": 1, "b": 1}
    assert match(index, [9, 9]) == {}
    assert apply(index, removed(20)).removed == 1
    assert match(index, [1, 2, 3, 4, 5, 6]) == {"a": 1, "b": 1}
    assert len(index) == 3


def test_a_sequence_goes_on_from_its_parent() -> None:
    index = KVBlockIndex(SIZE)
    apply(index, stored([10], [1, 2]), stored([20], [3, 4], parent=10))
    assert match(index, [1, 2, 3, 4]) == {"a": 2}
    lost = apply(index, stored([40], [7, 8], parent=30), server="b")
    assert lost.skipped == {("full_attention", "unknown_parent"): 1}
    assert match(index, [7, 8]) == {}


def test_the_last_token_is_always_computed() -> None:
    """vLLM takes at most the blocks before the last token from its cache."""
    index = KVBlockIndex(SIZE)
    apply(index, stored([10, 20], [1, 2, 3, 4]))
    keys = index.keys(token_bytes([1, 2, 3, 4]), MODEL, "")
    assert index.match(keys, 4, ["a"], 0.0) == {"a": 1}
    assert index.match(keys[:1], 2, ["a"], 0.0) == {}


def test_salts_models_and_adapters_have_blocks_of_their_own() -> None:
    index = KVBlockIndex(SIZE)
    apply(
        index,
        stored([1], [1, 2]),
        stored([2, 3], [1, 2, 3, 4], extra_keys=[["s"], None]),
        stored([4], [1, 2], lora_name="ada", extra_keys=[["ada"]]),
        stored([5], [1, 2], lora_name="ada", extra_keys=[["ada", "s"]]),
    )
    assert len(index) == 5
    assert match(index, [1, 2, 3, 4]) == {"a": 1}
    assert match(index, [1, 2, 3, 4], salt="s") == {"a": 2}
    assert match(index, [1, 2], salt="t") == {}
    for model, salt, count in (("ada", "", 1), ("ada", "s", 1), ("ada", "t", 0), ("other", "", 0)):
        assert match(index, [1, 2], model, salt) == ({"a": count} if count else {})
    apply(index, removed(2))
    assert match(index, [1, 2, 3, 4], salt="s") == {}
    assert match(index, [1, 2]) == {"a": 1}


def test_a_block_that_is_there_twice_is_removed_twice() -> None:
    index = KVBlockIndex(SIZE)
    apply(index, stored([10], [1, 2]), stored([10], [1, 2]), stored([10], [1, 2]))
    assert [apply(index, removed(10)).removed for _ in range(2)] == [0, 0]
    assert match(index, [1, 2]) == {"a": 1}
    assert apply(index, removed(10)).removed == 1
    assert match(index, [1, 2]) == {}
    assert apply(index, removed(10)).removed == 0


def test_places_and_groups_count_for_themselves() -> None:
    index = KVBlockIndex(SIZE)
    copy = {**stored([10], [1, 2]), "token_ids": [], "medium": "CPU"}
    apply(index, stored([10], [1, 2]), copy, stored([10], [1, 2], group_idx=1))
    assert apply(index, removed(10), removed(10, group_idx=1)).media == {0}
    assert match(index, [1, 2]) == {"a": 1}, "it is in the CPU's memory"
    apply(index, removed(10, medium="CPU"))
    assert match(index, [1, 2]) == {}


def test_all_is_cleared() -> None:
    index = KVBlockIndex(SIZE)
    apply(index, stored([10, 20], [1, 2, 3, 4]), server="b")
    changes = apply(index, stored([10, 20], [1, 2, 3, 4]), CLEARED, stored([30], [5, 6]))
    assert (changes.stored, changes.removed) == (3, 2)
    assert match(index, [1, 2]) == {"b": 1}
    assert match(index, [5, 6]) == {"a": 1}
    assert index.forget("b") == 2
    assert index.forget("b") == 0
    assert match(index, [1, 2]) == {}


def test_a_servers_blocks_may_be_larger_than_the_pickers() -> None:
    """They are cached as a whole: two tokens of a block of four say nothing."""
    index = KVBlockIndex(SIZE)
    apply(index, stored([10, 20], [1, 2, 3, 4, 5, 6, 7, 8]))
    assert match(index, [1, 2, 3, 4, 5, 6, 7, 8]) == {"a": 4}
    assert match(index, [1, 2, 3, 4, 5, 6, 0, 0]) == {"a": 2}
    keys = index.keys(token_bytes([1, 2, 3, 4, 5, 6, 7, 8]), MODEL, "")
    assert index.match(keys, 8, ["a"], 0.0) == {"a": 2}, "the last token is computed, and its block"


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        (stored([1], [1, 2], medium="ELSEWHERE"), ("full_attention", "not_on_the_server")),
        (stored([1], [1, 2], locality="REMOTE"), ("full_attention", "not_on_the_server")),
        (stored([1], [1, 2], kv_cache_spec_kind="sliding_window"), ("sliding_window", "unsupported_cache_kind")),
        (stored([1], [1, 2], kv_cache_spec_kind="brand new"), ("unknown", "unsupported_cache_kind")),
        (stored([1], [1, 2], kv_cache_spec_kind=None), ("unknown", "unsupported_cache_kind")),
        (stored([1], [1, 2], group_idx=-1), ("full_attention", "unsupported_cache_kind")),
        (stored([1], [1, 2], group_idx=1 << 16), ("full_attention", "unsupported_cache_kind")),
        (stored([1, 2], [1, 2, 3, 4], block_size=4), ("full_attention", "non_dense_block_span")),
        (stored([1, 2], [1, 2, 3]), ("full_attention", "non_dense_block_span")),
        (stored([1], [1, 2, 3]), ("full_attention", "block_size")),
        (stored([1], [1]), ("full_attention", "block_size")),
        (stored([1], [1, 2], extra_keys=[[["image", 0]]]), ("full_attention", "not_text")),
        (stored([1], [1, 2], extra_keys=[[["image", 0], "salt"]]), ("full_attention", "not_text")),
        (stored([1], [1, 2], extra_keys=[[b"digest"]]), ("full_attention", "not_text")),
        ({**stored([1], [1, 2]), "token_ids": []}, ("full_attention", "unknown_block")),
    ],
)
def test_what_is_no_prefix_is_left_out(event: dict[str, Any], cause: tuple[str, str]) -> None:
    index = KVBlockIndex(SIZE)
    changes = apply(index, event)
    assert (changes.stored, changes.skipped) == (0, {cause: 1})
    assert len(index) == 0
    assert match(index, [1, 2]) == {}


def test_text_before_media_is_a_prefix() -> None:
    index = KVBlockIndex(SIZE)
    changes = apply(
        index,
        stored([10, 20, 30], [1, 2, 3, 4, 5, 6], extra_keys=[["s"], [["image", 1]], None]),
        stored([40], [7, 8], parent=30),
    )
    assert (changes.stored, changes.skipped) == (1, {("full_attention", c): 1 for c in ("not_text", "unknown_parent")})
    assert match(index, [1, 2, 3, 4], salt="s") == {"a": 1}


def test_a_server_has_one_block_size() -> None:
    index = KVBlockIndex(SIZE)
    apply(index, stored([10], [1, 2, 3, 4]))
    assert apply(index, stored([20], [5, 6])).skipped == {("full_attention", "block_size"): 1}
    apply(index, CLEARED)
    assert apply(index, stored([20], [5, 6])).skipped == {}


def test_memory_is_bounded() -> None:
    index = KVBlockIndex(SIZE, capacity=3)
    apply(index, *(stored([n], [n, n]) for n in range(3)))
    apply(index, stored([0], [0, 0]), stored([3], [3, 3]))
    assert len(index) == 3
    assert [match(index, [n, n]) for n in range(4)] == [{"a": 1}, {}, {"a": 1}, {"a": 1}]
    apply(index, removed(0))
    assert match(index, [0, 0]) == {"a": 1}, "there was a second copy"
    apply(index, *(stored([n], [n, n]) for n in range(4, 7)), removed(0), removed(1))
    assert len(index) == 3
    assert match(index, [0, 0]) == {}


def test_what_is_expected_counts_for_a_while() -> None:
    index = KVBlockIndex(SIZE)
    keys = index.keys(token_bytes([1, 2, 3, 4]), MODEL, "")
    index.expect("a", keys[:1], until=5.0)
    index.expect("b", keys, until=6.0)
    assert match(index, [1, 2, 3, 4], now=4.9) == {"a": 1, "b": 2}
    index.expect("a", keys, until=7.0)
    apply(index, stored([10], [1, 2]), server="b")
    assert match(index, [1, 2, 3, 4], now=6.0) == {"a": 2, "b": 1}
    index.forget("a")
    index.expect("c", keys, until=8.0)
    assert match(index, [1, 2, 3, 4], now=7.0) == {"b": 1}
    assert len(index) == 1


PROMPT = st.lists(st.integers(0, 2), max_size=4).map(lambda blocks: [t for b in blocks for t in (b, b)])


class EventsAgainstSets(RuleBasedStateMachine):
    """The index against, for each server, how many copies of each prefix it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KVBlockIndex(SIZE)
        self.held: dict[str, Counter[tuple[str, tuple[int, ...]]]] = {"a": Counter(), "b": Counter()}
        self.numbers: dict[tuple[str, tuple[int, ...]], int] = {}

    def number(self, salt: str, prefix: list[int]) -> int:
        return self.numbers.setdefault((salt, tuple(prefix)), len(self.numbers) + (1 << 63))

    @rule(server=st.sampled_from("ab"), salt=st.sampled_from(["", "s"]), prompt=PROMPT, start=st.integers(0, 3))
    def store(self, server: str, salt: str, prompt: list[int], start: int) -> None:
        """The blocks after those at ``start``, whose parent must be there, as it is in vLLM."""
        start = min(start, len(prompt) // SIZE)
        parent = prompt[: start * SIZE]
        if start and not self.held[server][salt, tuple(parent)]:
            return
        ends = range((start + 1) * SIZE, len(prompt) + 1, SIZE)
        if not ends:
            return
        hashes = [self.number(salt, prompt[:end]) for end in ends]
        extra: list[Any] = [None] * len(hashes)
        if salt and not start:
            extra[0] = [salt]
        before = self.number(salt, parent) if start else None
        apply(self.index, stored(hashes, prompt[start * SIZE :], before, extra_keys=extra), server=server)
        self.held[server].update((salt, tuple(prompt[:end])) for end in ends)

    @rule(server=st.sampled_from("ab"), choice=st.integers(0, 50))
    def remove(self, server: str, choice: int) -> None:
        known = sorted(self.numbers)
        if known:
            salt, prefix = known[choice % len(known)]
            apply(self.index, removed(self.numbers[salt, prefix]), server=server)
            self.held[server] -= Counter([(salt, prefix)])

    @rule(server=st.sampled_from("ab"))
    def clear(self, server: str) -> None:
        apply(self.index, CLEARED, server=server)
        self.held[server].clear()

    @rule(server=st.sampled_from("ab"))
    def restart(self, server: str) -> None:
        self.index.forget(server)
        self.held[server].clear()

    @rule(prompt=PROMPT, salt=st.sampled_from(["", "s", "t"]))
    def ask(self, prompt: list[int], salt: str) -> None:
        expected = {}
        for server, held in self.held.items():
            count = 0
            while count * SIZE < len(prompt) and held[salt, tuple(prompt[: (count + 1) * SIZE])]:
                count += 1
            if count:
                expected[server] = count
        assert match(self.index, prompt, salt=salt) == expected

    @invariant()
    def sizes(self) -> None:
        assert len(self.index) == sum(sum(copies > 0 for copies in held.values()) for held in self.held.values())


EventsAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestEventsAgainstSets = EventsAgainstSets.TestCase


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.booleans()), max_size=60), st.integers(1, 5))
def test_a_server_never_keeps_more_than_its_capacity(actions: list[tuple[str, int, bool]], capacity: int) -> None:
    index = KVBlockIndex(SIZE, capacity=capacity)
    for server, number, store in actions:
        apply(index, stored([number], [number] * SIZE) if store else removed(number), server=server)
        held = Counter(name for block in range(7) for name in match(index, [block] * SIZE))
        assert max(held.values(), default=0) <= capacity
        assert held.total() == len(index)
    for server in "ab":
        index.forget(server)
    assert index._holders == {}, "nothing is left behind"


@given(st.lists(st.sampled_from(["store", "expect", "forget", "expire"]), max_size=30))
def test_expectations_leave_nothing_behind(actions: list[str]) -> None:
    index, now = KVBlockIndex(SIZE), 0.0
    keys = index.keys(token_bytes([1, 2, 3, 4]), MODEL, "")
    for action in actions:
        now += 1
        if action == "store":
            apply(index, stored([10], [1, 2]))
        elif action == "expect":
            index.expect("a", keys, now + 2)
            assert match(index, [1, 2, 3, 4], now=now) == {"a": 2}
        elif action == "forget":
            index.forget("a")
            assert match(index, [1, 2], now=now) == {}
        else:
            now += 2
            assert match(index, [1, 2, 3, 4], now=now) == ({"a": 1} if len(index) else {})
    match(index, [], now=now + 5)
    index.forget("a")
    assert index._holders == {}
