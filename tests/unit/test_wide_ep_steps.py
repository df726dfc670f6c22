"""What the wide-ep analysis makes of steps whose truth is known."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from example_steps import ATTENTION_MS, EXPERTS_MS, OTHER_MS, TRANSFER_MS, step, steps
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.errors import UserError
from llmtrace.scenarios.wide_ep.clocks import skews
from llmtrace.scenarios.wide_ep.experts import expert_load
from llmtrace.scenarios.wide_ep.steps import ATTRIBUTES, read_steps
from llmtrace.scenarios.wide_ep.verify import step_faults
from llmtrace.scenarios.wide_ep.waiting import LATE_MS, START, balance_saving_ms, stragglers, waited
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import AttributeValue, Trace

DELAY_MS = 20.0


def test_columns() -> None:
    found = read_steps(steps(3, 16))
    assert (found.count, len(found.rank), found.nodes, found.partial) == (3, 48, ("node-0", "node-1"), 0)
    assert found.sizes.tolist() == [16, 16, 16]
    assert found.rank.tolist() == [*range(16)] * 3
    assert found.node.tolist() == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert found.phases[0].tolist() == [ATTENTION_MS, TRANSFER_MS, EXPERTS_MS, TRANSFER_MS, 0.0]
    assert found.other == pytest.approx(np.full(48, OTHER_MS), abs=1e-5)
    assert set(found.tokens.tolist()) == {4}


@pytest.mark.parametrize("slow", ["attention", "experts", "other"])
def test_a_slow_rank_is_named_with_its_delay_and_its_phase(slow: str) -> None:
    usual = {"attention": ATTENTION_MS, "experts": EXPERTS_MS, "other": OTHER_MS}[slow]
    found = read_steps(steps(10, 16, **{f"{slow}_ms": {11: usual + DELAY_MS}}))
    (straggler,) = stragglers(found)
    assert (straggler.rank, straggler.node, straggler.steps, straggler.share) == (11, "node-1", 10, 1.0)
    assert straggler.phase == slow
    assert straggler.delay_ms == pytest.approx(DELAY_MS)
    assert straggler.total_ms == pytest.approx(10 * DELAY_MS)


def test_two_slow_ranks_each_with_its_steps() -> None:
    mixed = [step(n, 4, experts_ms={n % 3 % 2 + 1: EXPERTS_MS + DELAY_MS}) for n in range(9)]
    first, second = stragglers(read_steps(mixed))
    assert [(s.rank, s.steps) for s in (first, second)] == [(1, 6), (2, 3)]


def test_one_rank_waits_for_nobody() -> None:
    found = read_steps(steps(3, 1))
    assert stragglers(found) == []
    assert waited(found).tolist() == [0.0] * 3


@given(st.lists(st.floats(0.1, 50), min_size=2, max_size=8))
def test_waiting_is_the_distance_to_the_last(work: list[float]) -> None:
    found = read_steps([step(0, len(work), experts_ms=dict(enumerate(work)))])
    assert waited(found) == pytest.approx([max(work) - w for w in work], abs=1e-9)
    assert balance_saving_ms(found) == pytest.approx(max(work) - sum(work) / len(work), abs=1e-9)


def test_a_step_that_lacks_a_rank_or_has_one_twice_is_left_out_and_counted() -> None:
    whole = step(0, 4)
    missing = Trace("b" * 32, step(1, 4).spans[:3])
    again = step(2, 4).spans
    twice = Trace("c" * 32, (*again[:3], replace(again[0], span_id="f" * 16)))
    silent = [replace(s, attributes={k: v for k, v in s.attributes.items() if k != a.STEP_WAIT}) for s in again]
    found = read_steps([whole, missing, twice, Trace("d" * 32, tuple(silent)), Trace("e" * 32, ())])
    assert (found.count, found.partial) == (1, 3)
    with pytest.raises(UserError, match="engine_step"):
        read_steps([missing])


@pytest.mark.parametrize("odd", ["4", None, [4], 2**70, 0.5])
@pytest.mark.parametrize("name", [a.WORLD_RANK, a.STEP_PREFILL_TOKENS, a.STEP_ATTENTION, a.EXPERT_TOKENS])
def test_what_is_no_number_makes_a_step_not_count_and_no_more(name: str, odd: AttributeValue) -> None:
    whole, other = step(0, 4, tokens=[1, 2]), step(1, 4, tokens=[1, 2]).spans
    changed = replace(other[2], attributes={**other[2].attributes, name: [odd] if name == a.EXPERT_TOKENS else odd})
    found = read_steps([whole, Trace("b" * 32, (*other[:2], changed, other[3]))])
    if name == a.EXPERT_TOKENS:
        assert (found.count, found.expert_tokens.tolist()) == (2, [7, 14])
    elif (name, odd) in ((a.STEP_ATTENTION, 0.5), (a.STEP_ATTENTION, 2**70)):
        assert found.count == 2
    else:
        assert (found.count, found.partial) == (1, 1)


def test_a_step_without_phases_counts_for_all_the_rest() -> None:
    graphs = [step(n, 4, tokens=[1, 2], phased=False) for n in (3, 4)]
    found = read_steps([*steps(3, 4), *graphs])
    assert (found.count, found.partial) == (5, 0)
    assert found.phased.tolist() == [True] * 3 + [False] * 2
    assert found.expert_tokens.tolist() == [8, 16]
    assert found.parts.sum(axis=1) == pytest.approx(found.duration)
    assert found.parts[0] == pytest.approx([ATTENTION_MS, TRANSFER_MS, EXPERTS_MS, TRANSFER_MS, 0.0, OTHER_MS, 0.0])
    assert found.parts[-1] == pytest.approx([0.0] * 6 + [found.duration[-1]])
    assert balance_saving_ms(found) == 0.0
    whole = found.parts[:, -1].reshape(5, 4)[3:]
    assert (whole == found.duration[-1]).all()


def test_a_rank_that_begins_late_is_seen_without_phases_and_nothing_of_what_is_within() -> None:
    slow = [step(n, 4, experts_ms={1: EXPERTS_MS + DELAY_MS}, phased=False) for n in range(3)]
    assert stragglers(read_steps(slow)) == []
    late = [step(n, 4, late_ms={3: DELAY_MS}, phased=False) for n in range(3, 9)]
    found = read_steps([*slow, *late])
    (straggler,) = stragglers(found)
    assert (straggler.rank, straggler.phase, straggler.steps, straggler.share) == (3, START, 6, pytest.approx(6 / 9))
    assert (straggler.delay_ms, straggler.total_ms) == pytest.approx((DELAY_MS, 6 * DELAY_MS))
    assert waited(found).sum() == pytest.approx(6 * 3 * DELAY_MS)
    assert stragglers(read_steps([step(0, 4, late_ms={3: LATE_MS / 2}, phased=False)])) == []


def test_shares_of_stragglers_are_of_the_steps_that_show_them() -> None:
    eager = [step(n, 4, experts_ms={1: EXPERTS_MS + DELAY_MS}) for n in range(3)]
    graphs = [step(n, 4, phased=False, late_ms={2: 2 * DELAY_MS} if n == 9 else None) for n in range(3, 13)]
    first, second = stragglers(read_steps([*eager, *graphs]))
    assert (first.rank, first.phase, first.share) == (1, "experts", 1.0)
    assert (second.rank, second.phase, second.share) == (2, START, pytest.approx(0.1))


def test_phases_of_some_ranks_are_those_of_no_step() -> None:
    whole, silent = step(0, 2).spans, step(0, 2, phased=False).spans
    mixed = Trace(whole[0].trace_id, (whole[0], silent[1]))
    found = read_steps([mixed])
    assert (found.partial, found.phased.tolist()) == (0, [False])
    assert found.parts[:, -1] == pytest.approx(found.duration)
    assert step_faults(mixed) == ["these ranks do not say their phases, and others do: 1"]


def test_the_sample_is_what_is_left_without_the_steps_on_demand() -> None:
    usual, slow = [*steps(6, 4)], [step(n, 4, experts_ms={1: 99.0}, reason=a.REASON_ON_DEMAND) for n in range(6, 20)]
    both = read_steps([*usual[:3], *slow, *usual[3:]])
    assert (both.count, both.on_demand.sum()) == (20, 14)
    alone, sample = read_steps(usual), both.sampled()
    for item in fields(alone):
        assert np.array_equal(getattr(sample, item.name), getattr(alone, item.name)), item.name
    assert alone.sampled() is alone
    with pytest.raises(UserError, match="LLMTRACE_STEP_EVERY"):
        read_steps(slow).sampled()


def test_a_step_of_an_older_plugin_is_of_the_sample() -> None:
    spans = step(0, 2).spans
    old = [replace(s, attributes={k: v for k, v in s.attributes.items() if k != a.STEP_REASON}) for s in spans]
    assert read_steps([Trace("a" * 32, tuple(old))]).on_demand.tolist() == [False]


def test_experts_of_which_a_later_step_knows_more() -> None:
    found = read_steps([step(0, 2, tokens=[1, 2]), step(1, 2, tokens=[1, 2, 3])])
    assert found.sent.tolist() == [[2, 4, 3]] * 2


def test_skewed_experts_are_reported_with_their_shares() -> None:
    load = expert_load(read_steps(steps(5, 2, tokens=[10, 0, 70, 20])).expert_tokens)
    assert load is not None
    assert (load.experts, load.tokens, load.top[:2]) == (4, 1000, [2, 3])
    assert load.shares[:2] == [0.7, 0.2]
    assert load.max_over_mean == pytest.approx(2.8)
    assert 0 < load.entropy < 1


def test_even_and_no_experts() -> None:
    even = expert_load(np.full(8, 5))
    assert even is not None
    assert (even.max_over_mean, even.entropy) == pytest.approx((1.0, 1.0))
    assert expert_load(read_steps(steps(2, 2)).expert_tokens) is None


@pytest.mark.parametrize("ahead_ms", [25.0, -3.0])
def test_a_skewed_clock_is_told_and_changes_nothing_else(ahead_ms: float) -> None:
    found = read_steps(steps(20, 24, clock_ms={1: ahead_ms}, experts_ms={11: EXPERTS_MS + DELAY_MS}))
    one, two = skews(found)
    assert (one.node, one.reference, one.told, one.steps) == ("node-1", "node-0", True, 20)
    assert one.skew_ms == pytest.approx(ahead_ms)
    assert (two.node, two.told) == ("node-2", False)
    (straggler,) = stragglers(found)
    assert (straggler.rank, straggler.delay_ms) == (11, pytest.approx(DELAY_MS))


def test_a_good_step_has_no_fault() -> None:
    assert step_faults(step(0, 4)) == []
    assert step_faults(step(0, 4, phased=False)) == []
    assert step_faults(Trace("e" * 32, ())) == []


def test_the_faults_of_a_step_are_named() -> None:
    good = step(0, 4).spans
    (missing,) = step_faults(Trace("a" * 32, (good[0], good[3])))
    assert missing == "4 ranks stepped, and these sent no span: 1, 2"
    (twice,) = step_faults(Trace("a" * 32, (*good, replace(good[2], span_id="f" * 16))))
    assert twice == "rank 2 sent 2 spans"
    long = replace(good[1], attributes={**good[1].attributes, a.STEP_EXPERTS: 100.0})
    (more,) = step_faults(Trace("a" * 32, (good[0], long, *good[2:])))
    assert more == "the phases of rank 1 take 105.0 ms, its step 12.0 ms"
    silent = replace(good[1], attributes={k: v for k, v in good[1].attributes.items() if k != a.STEP_WAIT})
    assert step_faults(Trace("a" * 32, (good[0], silent, *good[2:]))) == [f"rank 1 does not say {a.STEP_WAIT}"]
    more_ranks = tuple(replace(span, attributes={**span.attributes, a.STEP_RANKS: 3}) for span in good)
    (disagreeing,) = step_faults(Trace("a" * 32, more_ranks))
    assert disagreeing.startswith("its ranks do not agree on how many they are")


@pytest.mark.parametrize(
    ("attention_ms", "other_ms", "dummy", "faults"),
    [
        (1.0, 50.0, False, 0),  # a small model's, whose process waited for its processor
        (1000.0, 2000.0, False, 0),
        (1.0, 200.0, False, 1),
        (1.0, 200.0, True, 0),
    ],
)
def test_phases_that_leave_too_much_of_their_step_are_told(
    attention_ms: float, other_ms: float, dummy: bool, faults: int
) -> None:
    made = step(0, 2, attention_ms={0: attention_ms}, other_ms={0: other_ms}).spans
    marked = tuple(replace(span, attributes={**span.attributes, a.STEP_DUMMY: dummy}) for span in made)
    found = step_faults(Trace("a" * 32, marked))
    assert len(found) == faults
    assert all("of rank 0 take 8.0 ms, its step 208.0 ms" in fault for fault in found)


@pytest.mark.parametrize("dummy", [True, False])
def test_phases_that_are_all_zero_are_told(dummy: bool) -> None:
    zero = dict.fromkeys(ATTRIBUTES, 0.0)
    made = (replace(s, attributes={**s.attributes, **zero, a.STEP_DUMMY: dummy}) for s in step(0, 1).spans)
    assert step_faults(Trace("a" * 32, tuple(made))) == ["the phases of rank 0 take 0.0 ms, its step 12.0 ms"]
