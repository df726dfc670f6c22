"""The best threshold and what it saves, on requests drawn many times from a known truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrace.scenarios.facts import Served
from llmtrace.scenarios.pd_disaggregation.choice import Choice
from llmtrace.scenarios.pd_disaggregation.legs import Legs
from llmtrace.scenarios.pd_disaggregation.regret import Triple, best_threshold, reason_regrets
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.scenarios.pd_disaggregation.rule import PREFIX_DECIDER, SPLITTING, Decider, reason

DECIDER = Decider(PREFIX_DECIDER, 512)


def triple(
    block: int, tenant: str, prompt: int, split_ms: float, unified_ms: float, decider: Decider = DECIDER
) -> Triple:
    why = reason(decider, prompt, 0)
    served = Served(
        f"{prompt:032x}", "by-threshold", block, "p", tenant, "c", 0, 0, False, 1.0, 2.0, prompt, 16, 0, "decode-0"
    )
    choice = Choice(split=why in SPLITTING, reason=why, decider=decider, prompt_tokens=prompt, cached_tokens=0)
    split, unified = ({"ttft": ms, "e2e": ms + 800} for ms in (split_ms, unified_ms))
    return Triple(Handled(served, choice, Legs(None, None, None)), split, unified)  # type: ignore[arg-type]


def drawn(seed: int, gain: Callable[[int], float], noise: float = 80.0) -> list[Triple]:
    """Five requests of each of four tenants in three blocks; ``gain`` is what splitting saves, in ms."""
    rng = np.random.default_rng(seed)
    found = []
    for block in range(3):
        for tenant in "abcd":
            together = rng.normal(0, noise / 2, 2)
            for prompt in rng.integers(20, 1700, 5):
                split, unified = rng.normal(0, noise, 2) + together
                found.append(triple(block, tenant, int(prompt), 500 - gain(int(prompt)) + split, 500 + unified))
    return found


def test_where_nothing_matters_a_better_threshold_is_seldom_claimed() -> None:
    claimed = determined = 0
    for seed in range(40):
        best = best_threshold(drawn(seed, lambda prompt: 0.0), "ttft", seed)
        assert best is not None
        claimed += best.conclusion == "improvement"
        determined += best.determined
    assert claimed <= 4
    assert determined <= 8


def test_the_interval_holds_the_true_threshold_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(40):
        best = best_threshold(drawn(seed, lambda prompt: 0.3 * (prompt - 800)), "ttft", seed)
        assert best is not None
        held += best.low <= 800 <= (best.high or 10**6)
    assert held >= 36


def test_a_loss_is_found_more_often_the_larger_it_is() -> None:
    def found(slope: float) -> int:
        runs = [best_threshold(drawn(seed, lambda prompt: slope * (prompt - 1100)), "ttft", seed) for seed in range(12)]
        return sum(run is not None and run.conclusion == "improvement" for run in runs)

    assert found(0.1) < found(1.0)
    assert found(1.0) >= 11


def test_a_minimum_prompt_is_kept_by_every_threshold() -> None:
    decider = Decider(PREFIX_DECIDER, 512, 400)
    few = [triple(n, t, 100 + 100 * n, 100, 900, decider) for n in range(8) for t in "ab"]
    best = best_threshold(few, "ttft", 0)
    assert best is not None
    assert best.curve[0].mean_ms == (3 * 900 + 5 * 100) / 8, "prompts below the minimum are never split"
    assert (best.best_low, best.best_high) == (1, 400)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(10, 2000), st.floats(10, 2000)), min_size=3, max_size=30))
def test_the_curve_is_what_each_threshold_would_have_taken(requests: list[tuple[int, float, float]]) -> None:
    best = best_threshold([triple(n, "t", *r) for n, r in enumerate(requests)], "ttft", 0)
    assert best is not None
    for cut in best.curve:
        for threshold in {cut.low, cut.high} - {None}:
            took = [split if prompt >= (threshold or 0) else unified for prompt, split, unified in requests]
            assert abs(cut.mean_ms - sum(took) / len(took)) < 1e-6
    assert [a.high is not None and a.high + 1 == b.low for a, b in zip(best.curve, best.curve[1:], strict=False)] == [
        True
    ] * (len(best.curve) - 1)
    assert best.curve[-1].high is None
    least = min(cut.mean_ms for cut in best.curve)
    assert any(cut.mean_ms == least and cut.low == best.best_low for cut in best.curve)
    assert best.low <= best.best_low
    assert best.high is None or best.high >= (best.best_high or 0)


def test_many_different_prompts_are_thinned_out() -> None:
    best = best_threshold([triple(n % 5, "t", n, 100, 200) for n in range(1, 1001)], "ttft", 0)
    assert best is not None
    assert len(best.curve) == 200
    assert (best.curve[0].low, best.curve[-1].high) == (1, None)


def test_two_clusters_are_too_few_for_a_threshold_and_one_for_a_reason() -> None:
    assert best_threshold([triple(n, "t", 900, 1, 2) for n in range(2)], "ttft", 0) is None
    (ttft, e2e) = reason_regrets([triple(0, "t", 900, 1, 2)], 0)
    assert (ttft.lost_ms, ttft.conclusion, e2e.metric) == (None, "not supported", "e2e")
