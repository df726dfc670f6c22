from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrace.errors import UserError
from llmtrace.scenarios.pd_disaggregation.workload import PdWorkload, smoke_requests
from llmtrace.scenarios.workload import Request, tenants


def length(request: Request) -> int:
    """Four bytes a token, as the picker estimates."""
    return sum(len(m["content"]) for m in request.messages) // 4


def requests(workload: PdWorkload) -> list[Request]:
    return [r for b in range(workload.blocks) for c in workload.chats(b) for r in c.requests]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 1000))
def test_the_workload_follows_from_its_seed(blocks: int, conversations: int, turns: int, seed: int) -> None:
    workload = PdWorkload(blocks, conversations, turns, seed)
    found = requests(workload)
    assert found == requests(PdWorkload(blocks, conversations, turns, seed))
    assert len(found) == workload.size == len({r.pair_id for r in found})
    assert set(Counter(r.tenant for r in found).values()) == {blocks * conversations * (turns + 2)}


def test_lengths_are_spread_over_all_that_a_threshold_can_tell_apart() -> None:
    cold = [length(r) for r in requests(PdWorkload()) if r.turn == 0]
    for low, high in ((0, 100), (100, 512), (512, 1000), (1400, 2000)):
        assert any(low <= tokens < high for tokens in cold), (low, high)


def test_later_turns_are_warm_and_the_last_brings_hundreds_of_new_tokens() -> None:
    for chat in PdWorkload(seed=7).chats(0):
        if len(chat.requests) < 3:
            continue
        first, second, third = chat.requests
        assert second.messages[: len(first.messages)] == first.messages
        assert third.messages[: len(second.messages)] == second.messages
        assert length(second) - length(first) < 150
        assert length(third) - length(second) > 100


def test_an_excerpt_does_not_begin_like_the_handbook() -> None:
    for chat in PdWorkload().chats(0):
        if chat.requests[0].conversation.endswith("excerpt"):
            handbook = tenants()[chat.requests[0].tenant].handbook
            (message,) = chat.requests[0].messages
            assert handbook[:60] not in message["content"]


def test_the_smoke_requests_are_one_of_each_kind() -> None:
    cold, warm, short = smoke_requests()
    assert cold.conversation == warm.conversation != short.conversation
    assert warm.messages[: len(cold.messages)] == cold.messages
    assert length(cold) > 1300
    assert length(warm) - length(cold) < 150
    assert length(short) < 64
    assert len({r.pair_id for r in (cold, warm, short)}) == 3


@pytest.mark.parametrize("sizes", [{"blocks": 0}, {"conversations": 21}, {"turns": 4}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(sizes))):
        PdWorkload(**sizes)


def test_three_arms_take_turns_at_coming_first() -> None:
    workload = PdWorkload(blocks=6)
    orders = [workload.arm_order(block, ("a", "b", "c")) for block in range(6)]
    for place in range(3):
        assert set(Counter(order[place] for order in orders).values()) == {2}
    assert orders[0] == orders[3]


def test_a_run_of_all_arms_is_no_more_than_a_search_gives() -> None:
    assert 3 * (PdWorkload.most_requests + 50) <= 5000
    with pytest.raises(UserError, match="make it smaller"):
        PdWorkload(blocks=50, conversations=2)
