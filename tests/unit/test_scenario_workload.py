from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrace.errors import UserError
from llmtrace.scenarios.prefix_cache.workload import PrefixCacheWorkload
from llmtrace.scenarios.workload import tenants


def test_tenants_have_long_contexts_of_their_own() -> None:
    assert len(tenants()) == 4
    for tenant in tenants().values():
        assert 900 <= len(tenant.handbook.split()) <= 1400
        paragraphs = [p for p in tenant.handbook.split("\n") if p]
        assert len(set(paragraphs)) == len(paragraphs)
    openings = {t.handbook[:40] for t in tenants().values()}
    assert len(openings) == 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_the_workload_follows_from_its_seed(blocks: int, conversations: int, turns: int, seed: int) -> None:
    workload = PrefixCacheWorkload(blocks, conversations, turns, seed)
    requests = [r for b in range(blocks) for c in workload.chats(b) for r in c.requests]
    again = [
        r
        for b in range(blocks)
        for c in PrefixCacheWorkload(blocks, conversations, turns, seed).chats(b)
        for r in c.requests
    ]
    assert requests == again
    assert len(requests) == workload.size
    assert len({r.pair_id for r in requests}) == workload.size
    assert set(Counter(r.tenant for r in requests).values()) == {blocks * conversations * turns}


def test_each_turn_continues_the_one_before() -> None:
    for chat in PrefixCacheWorkload(turns=3).chats(0):
        for before, after in zip(chat.requests, chat.requests[1:], strict=False):
            assert after.messages[: len(before.messages)] == before.messages
            assert [m["role"] for m in after.messages[len(before.messages) :]] == ["assistant", "user"]


def test_other_seeds_give_other_chats() -> None:
    assert PrefixCacheWorkload(seed=1).chats(0) != PrefixCacheWorkload(seed=2).chats(0)
    assert PrefixCacheWorkload(seed=1).chats(0) != PrefixCacheWorkload(seed=1).chats(1)


def test_the_order_of_the_arms_is_counterbalanced() -> None:
    workload = PrefixCacheWorkload(blocks=4, seed=5)
    orders = [workload.arm_order(b, ("a", "b")) for b in range(4)]
    assert orders[0] == orders[2] != orders[1] == orders[3]
    assert len({PrefixCacheWorkload(seed=s).arm_order(0, ("a", "b")) for s in range(20)}) == 2


@pytest.mark.parametrize("sizes", [{"blocks": 0}, {"conversations": 21}, {"turns": 99}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(sizes))):
        PrefixCacheWorkload(**sizes)
