"""The pd-disaggregation answer from synthetic runs whose right answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from example_pd_traces import ARMS, BLOCK_BYTES, KV_BLOCK, Request, pd_block, pd_run, pd_trace
from example_traces import changed
from rich.console import Console

from llmtrace.errors import UserError
from llmtrace.scenarios.checks import Check
from llmtrace.scenarios.pd_disaggregation.answer import PdAnswer, answer
from llmtrace.scenarios.pd_disaggregation.regret import ReasonRegret, ThresholdAnswer
from llmtrace.scenarios.pd_disaggregation.text import answer_text
from llmtrace.traces.model import Trace


def even(uncached: int, split: bool) -> float:
    """Splitting pays off from 512 uncached tokens on, and by 0.3 ms for each of them."""
    return 200 + 0.6 * uncached - (0.3 * (uncached - 512) if split else 0)


def late(uncached: int, split: bool) -> float:
    """Splitting pays off only from 1,000 uncached tokens on."""
    return 200 + 0.6 * uncached - (0.4 * (uncached - 1000) if split else 0)


EVEN = pd_run(even)


def failing(found: PdAnswer) -> list[str]:
    return [c.name for c in found.checks if c.ok is False]


def check(found: PdAnswer, words: str) -> Check:
    (one,) = [c for c in found.checks if words in c.name]
    return one


def of(found: PdAnswer, metric: str = "ttft") -> ThresholdAnswer:
    (one,) = [t for t in found.thresholds if t.metric == metric]
    return one


def regret(found: PdAnswer, reason: str, metric: str = "ttft") -> ReasonRegret:
    (one,) = [r for r in found.regrets if r.reason == reason and r.metric == metric]
    return one


def shown(found: PdAnswer) -> str:
    console = Console(width=500)
    with console.capture() as captured:
        for part in answer_text(found):
            console.print(part)
    return captured.get()


def test_a_threshold_that_is_right_is_found_to_be() -> None:
    found = answer("run-1", EVEN)
    assert failing(found) == []
    best = of(found)
    assert (best.configured, best.determined, best.conclusion) == (512, True, "not supported")
    assert best.low <= 512 <= (best.high or 0)
    assert abs(best.saved_ms.estimate) < 3
    assert {r.reason: r.conclusion for r in found.regrets if r.metric == "ttft"} == {
        "uncached_at_or_above_threshold": "improvement",
        "uncached_below_threshold": "improvement",
    }
    saved = {(c.candidate, c.baseline): c for c in found.comparisons if c.metric == "TTFT"}
    assert saved["by-threshold", "always-split"].conclusion == "improvement"
    assert saved["by-threshold", "never-split"].conclusion == "improvement"
    assert found.supported
    assert "improves on never splitting" in found.verdict
    assert "that the configured 512 lost time is not supported" in found.verdict


def test_time_that_the_threshold_lost_is_found_with_its_size_and_the_threshold_that_loses_none() -> None:
    found = answer("run-1", pd_run(late))
    best = of(found)
    # Of 1,600 tokens the choices from 512 to 1,000 lose 0.4 ms a token that is missing to 1,000.
    lost = 0.4 * (1000 - 512) ** 2 / 2 / 1600
    assert best.conclusion == "improvement"
    assert best.saved_ms.low < lost < best.saved_ms.high
    assert best.saved_ms.estimate == pytest.approx(lost, rel=0.25)
    assert best.determined
    assert 512 < best.low <= 1000 <= (best.high or 0)
    assert f"the configured 512 lost time against it ({best.saved_ms.estimate:+.0f} ms" in found.verdict
    assert of(found, "e2e").conclusion == "improvement"


def test_what_each_choice_lost_is_the_difference_of_the_forced_arms() -> None:
    found = answer("run-1", pd_run(lambda uncached, split: 500.0 if split else 440.0))
    split, unified = regret(found, "uncached_at_or_above_threshold"), regret(found, "uncached_below_threshold")
    assert split.lost_ms is not None
    assert unified.lost_ms is not None
    assert split.lost_ms.low < 60 < split.lost_ms.high
    assert unified.lost_ms.low < -60 < unified.lost_ms.high
    assert (split.conclusion, unified.conclusion) == ("regression", "improvement")
    assert split.requests + unified.requests == 96
    each = [r for r in found.requests if r.split and r.arm == "by-threshold"]
    assert all(r.lost_ttft_ms == pytest.approx(60, abs=45) for r in each)
    assert all(r.lost_ttft_ms is None for r in found.requests if r.arm != "by-threshold")


@pytest.mark.parametrize(
    ("pays", "low", "high"), [(-100.0, 1, 40), (100.0, 1641, None)], ids=["always split", "never split"]
)
def test_where_one_way_is_always_better_the_best_threshold_says_so(pays: float, low: int, high: int | None) -> None:
    best = of(answer("run-1", pd_run(lambda uncached, split: 500.0 + (pays if split else 0.0))))
    assert (best.best_low, best.best_high) == (low, high)
    # A sample that lacks the shortest or the longest prompts cannot tell these thresholds apart.
    assert abs(best.low - low) < 250
    assert best.high is None if high is None else abs((best.high or 0) - high) < 250
    assert best.determined
    assert best.conclusion == "improvement"


def test_without_a_difference_nothing_is_determined_or_supported() -> None:
    found = answer("run-1", pd_run(lambda uncached, split: 500.0, noise_ms=60))
    best = of(found)
    assert not best.determined
    assert best.conclusion == "not supported"
    assert "do not determine the best threshold" in found.verdict
    assert not found.supported
    assert found.verdict.count("not supported") >= 3


def test_decoding_that_prefills_disturb_shows_end_to_end_and_not_in_ttft() -> None:
    found = answer("run-1", pd_run(lambda uncached, split: 500.0, lambda uncached, split: 800.0 - 120.0 * split))
    saved = {c.metric: c for c in found.comparisons if (c.candidate, c.baseline) == ("always-split", "never-split")}
    assert saved["TTFT"].conclusion == "not supported"
    assert saved["end to end"].saved_ms.estimate == pytest.approx(120, abs=10)
    assert saved["TPOT"].saved_ms.estimate == pytest.approx(120 / 15, abs=1)


def test_totals_by_reason_and_arm() -> None:
    found = answer("run-1", EVEN)
    totals = {(t.arm, t.split, str(t.reason)): t.requests for t in found.reasons}
    above = sum(r.uncached_tokens >= 512 for r in found.requests if r.arm == "by-threshold" and r.uncached_tokens)
    assert totals == {
        ("by-threshold", True, "uncached_at_or_above_threshold"): above,
        ("by-threshold", False, "uncached_below_threshold"): 96 - above,
        ("always-split", True, "always"): 96,
        ("never-split", False, "splitting_disabled"): 96,
    }
    assert [(a.arm, a.requests, a.split) for a in found.arms] == [
        ("by-threshold", 96, above),
        ("always-split", 96, 96),
        ("never-split", 96, 0),
    ]


def test_the_cost_of_the_kv_transfer_by_pair_of_servers() -> None:
    requests = [
        Request(n, decode=d, load_ms=60, transfer_ms=20) for n, d in ((1, "decode-0"), (2, "decode-1"), (3, "decode-1"))
    ]
    found = answer("run-1", [pd_trace(r) for r in requests])
    assert [(t.source, t.target, t.transfers, t.failed) for t in found.transfers] == [
        ("prefill-0", "decode-0", 1, 0),
        ("prefill-0", "decode-1", 2, 0),
    ]
    one, two = found.transfers
    assert (one.tokens, one.blocks, one.bytes) == (1640, 52, 52 * BLOCK_BYTES)
    assert two.blocks == 104
    assert one.wait is not None
    assert one.transfer is not None
    assert one.ttft_share is not None
    assert (one.wait.p50, one.transfer.p50, one.ttft_share.p50) == pytest.approx((50, 20, 50 / 900))
    assert two.bytes_per_s == pytest.approx(52 * BLOCK_BYTES / 0.020)


def test_the_parts_of_the_time_to_first_token_add_up() -> None:
    found = answer("run-1", EVEN)
    assert [(p.arm, p.split) for p in found.ttft_parts] == [
        ("by-threshold", True),
        ("by-threshold", False),
        ("always-split", True),
        ("never-split", False),
    ]
    for p in found.ttft_parts:
        told = p.prefill_queue + p.prefill + p.kv_load + p.decode_queue + p.decode_prefill
        assert told + p.rest == pytest.approx(p.ttft)
        assert (p.kv_load > 0) == (p.prefill > 0) == p.split
        assert 0 < p.rest < 30


def same(kit: PdAnswer, other: PdAnswer) -> bool:
    """Whether two answers say the same, but for what is derived."""

    def said(found: PdAnswer) -> Any:
        told = found.model_dump(exclude={"checks", "notes", "requests"})
        return told, [r.model_dump(exclude={"derived", "sentence"}) for r in found.requests]

    return said(kit) == said(other)


def test_llm_ds_own_picker_gives_the_same_answer_with_its_numbers_marked() -> None:
    kit, upstream = answer("run-1", EVEN), answer("run-1", pd_run(even, upstream=True))
    assert same(kit, upstream)
    assert failing(upstream) == []
    assert check(upstream, "the rule on the picker's own numbers").ok is None
    assert check(upstream, "recomputed from request").ok is True
    assert "[derived]" in shown(upstream)
    assert any("marked [derived]" in note for note in upstream.notes)
    assert not any("[derived]" in r.sentence for r in kit.requests if r.arm == "by-threshold")
    for r in upstream.requests:
        assert {"prompt_tokens", "cached_tokens", "decider", "reason"} <= set(r.derived)
        assert "split" not in r.derived, "prepare_disaggregation says it"


def test_without_the_plugin_the_choices_are_still_explained() -> None:
    found = answer("run-1", pd_run(even, plugin=False))
    assert failing(found) == []
    assert found.transfers == []
    assert found.ttft_parts == []
    assert of(found).conclusion == "not supported"
    assert any("lack the spans inside the model server" in note for note in found.notes)
    assert "the trace does not tell what the model servers did" in shown(found)


def test_one_sentence_a_request_with_its_numbers_and_trace() -> None:
    request = Request(prompt=1640, cached=32, ttft_ms=900, load_ms=60, transfer_ms=13.2)
    (split,) = answer("run-1", [pd_trace(request)]).requests
    assert split.sentence == (
        "split: 1,608 of 1,640 prompt tokens were not cached on decode-0 (threshold 512); "
        "waiting: 1 at decode-0, 0 at prefill-0; prefill on prefill-0 took 802 ms, "
        "KV transfer 37.6 MB in 50 ms (13 ms of it the transfer alone), 5.6 % of TTFT"
    )
    below = replace(request, split=False, reason="uncached_below_threshold", cached=1536)
    found = answer("run-1", [pd_trace(below)])
    assert found.requests[0].sentence == (
        "unified: 104 of 1,640 prompt tokens were not cached on decode-0 (threshold 512); "
        "waiting: 1 at decode-0; prefill on decode-0 took 892 ms"
    )
    assert f"{found.requests[0].trace_id}  {found.requests[0].sentence}" in shown(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"reason": "prompt_below_minimum", "prompt": 90, "minimum": 128},
            "the prompt has 90 tokens, less than the minimum of 128",
        ),
        ({"reason": "no_prefix_data"}, "knew nothing of the cache of decode-0, 1,640 [derived] of 1,640"),
        ({"reason": "no_decider"}, "no decider is configured"),
        (
            {"reason": "no_prefill_endpoint"},
            "there was no prefill endpoint, 1,640 of 1,640 prompt tokens were not cached",
        ),
        (
            {"arm": "never-split", "reason": "splitting_disabled"},
            "splitting is switched off, 1,640 [derived] of 1,640 [derived]",
        ),
        ({"arm": "always-split", "reason": "always", "split": True}, "every request is split, 1,640 [derived] of"),
        ({"upstream": True}, "the trace does not tell why, 1,640 [derived] of 1,640 [derived] prompt tokens"),
        ({"split": True, "cached": 1632, "whole_blocks": True}, "took 822 ms, no KV was transferred"),
        ({"split": True, "transfer_ms": None}, "KV transfer 38.3 MB in 30 ms, 3.3 % of TTFT"),
    ],
)
def test_every_reason_has_its_words(changes: dict[str, Any], words: str) -> None:
    (told,) = answer("run-1", [pd_trace(**{"split": False, **changes})]).requests
    assert words in told.sentence


def test_a_run_of_another_scenario_has_no_requests() -> None:
    with pytest.raises(UserError, match="no measured requests of run run-9"):
        answer("run-9", [pd_block(1, "by-threshold", 0, [])])
    with pytest.raises(UserError, match="no measured requests"):
        answer("run-9", [pd_trace(arm="by-threshold", number=3), pd_trace(number=4)][:0])
    foreign = changed(pd_trace(), "chat smol", {"llmtrace.scenario.arm": "random"})
    with pytest.raises(UserError, match="no measured requests"):
        answer("run-9", [foreign])


def test_too_few_requests_are_not_compared() -> None:
    found = answer("run-1", [pd_trace(number=n, arm=arm) for n, arm in enumerate(ARMS, 1)])
    assert found.comparisons == []
    assert found.thresholds == []
    assert "Too few requests" in found.verdict


def one(traces: list[Trace], arm: str, *, split: bool) -> int:
    """The place of one request's trace."""
    return next(
        n
        for n, t in enumerate(traces)
        if t.roots[0].attributes.get("llmtrace.scenario.arm") == arm
        and (s := t.named("forward_request"))
        and s[0].attributes["llm_d.pd_proxy.disaggregation_used"] is split
    )


def damaged(change: Any, arm: str = "by-threshold", *, split: bool = True) -> tuple[PdAnswer, Trace]:
    traces = list(EVEN)
    place = one(traces, arm, split=split)
    traces[place] = change(traces[place])
    return answer("run-1", traces), traces[place]


def test_a_sidecar_that_does_otherwise_forbids_a_conclusion() -> None:
    found, trace = damaged(lambda t: changed(t, "forward_request", {"llm_d.pd_proxy.disaggregation_used": False}))
    assert "decision: picker, sidecar and the servers' legs" in failing(found)
    assert found.verdict.startswith("The sources disagree")
    assert not found.supported
    (line,) = check(found, "decision:").disagreements
    assert trace.trace_id in line
    assert "the picker decided split, the sidecar served it unified" in line


def moved(trace: Trace, server: str, other: str) -> Trace:
    spans = (
        replace(s, resource={**s.resource, "service.instance.id": other}) if s.instance == server else s
        for s in trace.spans
    )
    return Trace(trace.trace_id, tuple(spans))


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (lambda t: moved(t, "prefill-0", "decode-1"), "decision:", "its prefill leg is on decode-1, a decode server"),
        (lambda t: moved(t, "decode-0", "decode-1"), "decision:", "the picker chose decode-0, and decode-1 had"),
        (lambda t: moved(t, "decode-0", "prefill-0"), "decision:", "both of its legs are on prefill-0"),
        (
            lambda t: changed(t, "prepare_disaggregation", {"llmtrace.pd.cached_tokens": 5000}),
            "the picker's own numbers",
            "the picker says uncached_at_or_above_threshold, its own numbers uncached_below_threshold",
        ),
        (
            lambda t: changed(t, "prepare_disaggregation", {"llmtrace.pd.reason": "prompt_below_minimum"}),
            "the picker's own numbers",
            "the reason prompt_below_minimum does not lead to split",
        ),
        (
            lambda t: changed(t, "prepare_disaggregation", {"llmtrace.pd.prompt_tokens": 4000}),
            "picker's belief",
            "the picker believed",
        ),
        (
            lambda t: changed(t, "kv_load", {"llmtrace.kv_load.remote_engine_id": "engine-other"}),
            "KV of split requests",
            "its KV is from engine-other, its prefill leg was engine-prefill-0",
        ),
        (lambda t: changed(t, "kv_load", {"llmtrace.kv_load.failed": True}), "KV of split requests", "failed to load"),
        (
            lambda t: changed(t, "chat smol", {"gen_ai.usage.cache_read.input_tokens": 5}),
            "client's usage and vLLM's spans",
            "5 and",
        ),
    ],
)
def test_each_contradiction_is_listed_with_its_trace(change: Any, words: str, sentence: str) -> None:
    found, trace = damaged(change)
    lines = [line for c in found.checks if words in c.name for line in c.disagreements]
    assert any(sentence in line and trace.trace_id in line for line in lines), lines


def test_a_wrong_belief_of_the_picker_is_told_and_does_no_harm_to_the_comparison() -> None:
    traces = list(EVEN)
    place = one(traces, "by-threshold", split=True)
    was = pd_trace(
        number=place + 1,
        pair_id=str(traces[place].roots[0].attributes["llmtrace.scenario.pair_id"]),
        tenant=str(traces[place].roots[0].attributes["llmtrace.tenant"]),
        split=False,
        reason="uncached_below_threshold",
        prompt=1600,
        cached=0,
        believed=1536,
    )
    found = answer("run-1", [*traces[:place], was, *traces[place + 1 :]])
    lines = check(found, "recomputed").disagreements
    assert len(lines) == 1
    assert "of 1600 prompt tokens decode-0 had 0 cached, the picker believed 1536 cached" in lines[0]
    assert "sources disagree" not in found.verdict


def test_reasons_near_the_threshold_may_be_either() -> None:
    found = answer("run-1", pd_run(even, estimate=1.1))
    assert check(found, "recomputed").ok is True
    assert "so near the threshold that either is right" in check(found, "recomputed").detail
    assert failing(found) == []


def test_a_decode_server_that_computes_what_was_computed_is_named() -> None:
    found, _ = damaged(lambda t: changed(t, "prefill", {"llmtrace.prefill.computed_tokens": 10 * KV_BLOCK}))
    assert any(
        "computed 320 tokens that prefill-0 had computed" in line for line in check(found, "KV of").disagreements
    )


def test_a_lost_trace_fails_the_check_and_its_partners_are_not_judged() -> None:
    place = one(EVEN, "always-split", split=True)
    found = answer("run-1", [*EVEN[:place], *EVEN[place + 1 :]])
    assert "every request that was sent has its trace" in failing(found)
    assert (
        "1 requests of by-threshold have no counterpart in both other arms: their choice is not judged" in found.notes
    )


def test_a_forced_arm_that_did_not_obey_is_no_counterpart() -> None:
    traces = list(EVEN)
    place = one(traces, "always-split", split=True)
    root = traces[place].roots[0].attributes
    traces[place] = pd_trace(
        number=place + 1,
        arm="always-split",
        pair_id=str(root["llmtrace.scenario.pair_id"]),
        tenant=str(root["llmtrace.tenant"]),
        split=False,
        reason="no_prefill_endpoint",
        prompt=int(str(root["gen_ai.usage.input_tokens"])),
    )
    found = answer("run-1", traces)
    assert of(found).requests == 95
    assert check(found, "recomputed").ok is True
    (sentence,) = [r.sentence for r in found.requests if r.reason == "no_prefill_endpoint"]
    assert sentence.startswith("unified: there was no prefill endpoint, ")
