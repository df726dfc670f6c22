"""The prefix-cache answer from synthetic runs whose right answer is known."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from example_traces import SCORERS, SERVERS, block_trace, changed, request_trace

from llmtrace.errors import UserError
from llmtrace.scenarios.facts import Decision, Scorer, read_blocks, read_requests
from llmtrace.scenarios.prefix_cache.answer import PrefixCacheAnswer, answer
from llmtrace.scenarios.prefix_cache.routing import missed_decisions, reason
from llmtrace.traces.model import Trace

TENANTS = ("greenhouse", "harbour", "library", "observatory")


def run_traces(saving_ms: float, noise_ms: float = 20.0, blocks: int = 3) -> list[Trace]:
    """A run in which prefix-aware is faster by exactly ``saving_ms`` on average, and hits the cache."""
    rng = random.Random(7)
    noise = {}
    for arm in ("prefix-aware", "random"):
        drawn = [rng.gauss(0, noise_ms) for _ in range(blocks * len(TENANTS) * 3)]
        noise[arm] = iter([v - fmean(drawn) for v in drawn])
    traces: list[Trace] = []
    for block in range(blocks):
        for arm in ("prefix-aware", "random"):
            for tenant in TENANTS:
                for turn in range(3):
                    ttft = 600 + next(noise[arm]) - (saving_ms if arm == "prefix-aware" else 0)
                    traces.append(
                        request_trace(
                            len(traces) + 1,
                            arm=arm,
                            block=block,
                            tenant=tenant,
                            conversation=f"{tenant}-{block}",
                            pair_id=f"{tenant}-{block}-{turn}",
                            turn=turn,
                            start_ms=1000.0 * len(traces),
                            ttft_ms=ttft,
                            cached=1280 if arm == "prefix-aware" else 0,
                            endpoint=SERVERS[TENANTS.index(tenant) % 3],
                        )
                    )
            each = 1280 if arm == "prefix-aware" else 0
            hits, queries = (6 * each, 3 * each, 3 * each), (6 * 1500, 3 * 1500, 3 * 1500)
            traces.append(block_trace(10_000 + len(traces), arm, block, 12, hits, queries))
    return traces


def failing(found: PrefixCacheAnswer) -> list[str]:
    return [c.name for c in found.checks if c.ok is False]


def test_an_improvement_is_found_with_its_size() -> None:
    found = answer("run-1", run_traces(saving_ms=300))
    assert found.comparison is not None
    assert found.comparison.conclusion == "improvement"
    assert found.comparison.pairs == 36
    assert found.comparison.clusters == 12
    assert found.comparison.saved_ms.low < 300 < found.comparison.saved_ms.high
    assert found.comparison.ratio.estimate == pytest.approx(0.5, abs=0.05)
    assert "improves TTFT" in found.verdict
    assert failing(found) == []
    aware, other = found.arms
    assert (aware.hit_share, other.hit_share) == (pytest.approx(1280 / 1500), 0.0)
    assert {e.endpoint: e.requests for e in aware.endpoints} == {"vllm-0": 18, "vllm-1": 9, "vllm-2": 9}
    assert sum(e.cached_tokens for e in aware.endpoints) == aware.cached_tokens == 36 * 1280
    assert aware.ttft is not None
    assert aware.ttft_server is not None
    assert aware.ttft.mean - aware.ttft_server.mean == pytest.approx(6)
    assert aware.tpot is not None
    assert aware.tpot.p50 == pytest.approx(50)


def test_no_difference_is_not_called_an_improvement() -> None:
    found = answer("run-1", run_traces(saving_ms=0, noise_ms=80))
    assert found.comparison is not None
    assert found.comparison.conclusion == "not supported"
    assert "does not support" in found.verdict


def test_a_regression_is_called_one() -> None:
    found = answer("run-1", run_traces(saving_ms=-200))
    assert found.comparison is not None
    assert found.comparison.conclusion == "regression"
    assert "worsens" in found.verdict


def test_sources_that_disagree_forbid_a_conclusion() -> None:
    traces = run_traces(saving_ms=300)
    lost = [trace for trace in traces if trace.named("gateway.request")][:3]
    found = answer("run-1", [trace for trace in traces if trace not in lost])
    assert failing(found) != []
    assert found.comparison is not None
    assert found.comparison.conclusion == "not supported"
    assert found.verdict.startswith("The sources disagree")


def test_too_few_pairs_are_not_compared() -> None:
    found = answer("run-1", [request_trace(1), request_trace(2, arm="random")])
    assert found.comparison is None
    assert "too few" in found.verdict


def test_no_requests_is_an_error() -> None:
    with pytest.raises(UserError, match="no measured requests"):
        answer("run-9", [block_trace(1, "random", 0, 1, (0, 0, 0), (0, 0, 0))])


def test_warm_up_and_failed_requests_do_not_count() -> None:
    traces = run_traces(saving_ms=300)
    warm = changed(request_trace(5000, pair_id="warmup-0"), "chat smol", {"llmtrace.scenario.warmup": True})
    traces[0] = changed(traces[0], "chat smol", status="ERROR")
    found = answer("run-1", [*traces, warm])
    assert [(a.requests, a.failed) for a in found.arms] == [(36, 1), (36, 0)]
    assert found.comparison is not None
    assert found.comparison.pairs == 35


def test_a_lost_trace_fails_the_check() -> None:
    assert "every request that was sent has its trace" in failing(answer("run-1", run_traces(300)[1:]))


def test_a_gateway_that_counts_otherwise_is_listed() -> None:
    traces = run_traces(300)
    traces[4] = changed(traces[4], "gateway.request", {"gen_ai.usage.cache_read.input_tokens": 7})
    (check,) = [c for c in answer("run-1", traces).checks if "gateway" in c.name]
    assert not check.ok
    assert check.disagreements == [f"{traces[4].trace_id} (prefix-aware): 1280 and 7"]


@pytest.mark.parametrize(("excess", "ok"), [(128 * 6, True), (128 * 6 + 1, False)])
def test_vllms_counters_may_differ_by_one_block_a_request(excess: int, ok: bool) -> None:
    traces = [t for t in run_traces(300) if t.spans[0].name != "llmtrace.scenario.block"]
    blocks = []
    for block in range(3):
        for arm in ("prefix-aware", "random"):
            each = 1280 if arm == "prefix-aware" else 0
            more = excess if (arm, block) == ("random", 1) else 0
            hits = (6 * each + more, 3 * each, 3 * each)
            blocks.append(block_trace(10_000 + len(blocks), arm, block, 12, hits, (9000, 4500, 4500)))
    (check,) = [c for c in answer("run-1", [*traces, *blocks]).checks if "counters" in c.name]
    assert check.ok is ok
    assert ok or "vllm-0, random, block 1" in check.disagreements[0]


@pytest.mark.parametrize("lacking", ["llmtrace.scenario.prefix_cache_hits", "llmtrace.scenario.prefix_cache_queries"])
def test_a_server_that_lacks_one_of_its_counters_has_none(lacking: str) -> None:
    whole = block_trace(10_000, "random", 0, 12, (9, 9, 9), (90, 90, 90))
    damaged = changed(whole, "llmtrace.scenario.block", {lacking: [9]})
    (block,) = read_blocks([damaged])
    assert set(block.hits) == set(block.queries) == {"vllm-0"}
    answered = answer("run-1", [*run_traces(300), damaged])
    assert [c.ok for c in answered.checks if "counters" in c.name]


def scored(prefix: tuple[float, ...], queue: tuple[float, ...]) -> dict[str, tuple[float, float, float]]:
    return dict(zip([n for n, _ in SCORERS], [prefix, queue, (1.0, 1.0, 1.0)], strict=True))  # type: ignore[arg-type]


def test_a_missed_warmer_endpoint_with_its_cost_and_reason() -> None:
    trace = request_trace(
        1,
        arm="random",
        endpoint="vllm-1",
        match=(1400, 0, 64),
        scores=scored((0.9, 0.0, 0.1), (1.0, 1.0, 1.0)),
    )
    (missed,) = missed_decisions(read_requests([trace]), 128)
    assert (missed.chosen, missed.warmer, missed.source) == ("vllm-1", "vllm-0", "picker")
    assert missed.warmer_tokens == missed.avoidable_tokens == 1280
    assert missed.reason == "the picker did not follow the scores (vllm-0 3.80, vllm-1 2.00)"


def test_a_queue_that_outweighs_the_prefix_is_named() -> None:
    trace = request_trace(
        1,
        endpoint="vllm-1",
        cached=128,
        match=(700, 128, 0),
        scores=scored((0.4, 0.05, 0.0), (0.0, 1.0, 1.0)),
    )
    (missed,) = missed_decisions(read_requests([trace]), 128)
    assert missed.avoidable_tokens == 640 - 128
    assert missed.reason == "queue-scorer gave vllm-1 +1.00 (in all 2.10 to 1.80)"


@pytest.mark.parametrize("match", [(0, 0, 0), (127, 0, 0), (0, 1500, 0)])
def test_no_miss_below_a_block_or_when_the_chosen_one_was_warmest(match: tuple[int, int, int]) -> None:
    assert missed_decisions(read_requests([request_trace(1, endpoint="vllm-1", match=match)]), 128) == []


def test_the_whole_prompt_is_never_avoidable() -> None:
    trace = request_trace(1, endpoint="vllm-1", prompt=1280, match=(1280, 0, 0))
    (missed,) = missed_decisions(read_requests([trace]), 128)
    assert missed.avoidable_tokens == 1152


def test_without_the_pickers_word_warmth_is_derived_from_earlier_traces() -> None:
    def upstream(number: int, start: float, endpoint: str, turn: int, chat: str, cached: int = 0) -> Trace:
        return request_trace(
            number,
            arm="random",
            start_ms=start,
            endpoint=endpoint,
            turn=turn,
            conversation=chat,
            pair_id=f"p{number}",
            cached=cached,
            upstream=True,
        )

    traces = [
        upstream(1, 0, "vllm-0", 0, "a"),
        upstream(2, 1000, "vllm-0", 0, "b", cached=1152),  # shows how much all chats of the tenant share
        upstream(3, 2000, "vllm-1", 0, "c"),  # missed the shared context on vllm-0
        upstream(4, 3000, "vllm-2", 1, "a"),  # missed its own first turn on vllm-0
    ]
    missed = {m.trace_id: m for m in missed_decisions(read_requests(traces), 128)}
    assert set(missed) == {traces[2].trace_id, traces[3].trace_id}
    shared, own = missed[traces[2].trace_id], missed[traces[3].trace_id]
    assert (shared.warmer, shared.avoidable_tokens, shared.source) == ("vllm-0", 1152, "derived")
    assert (own.warmer, own.avoidable_tokens) == ("vllm-0", 1408)
    found = answer("run-1", traces)
    assert [c.ok for c in found.checks if "gateway" in c.name] == [None]
    assert any("derived from earlier requests" in note for note in found.notes)


def test_a_request_that_is_still_being_prefilled_warms_nothing() -> None:
    first = request_trace(1, start_ms=0, ttft_ms=500, upstream=True, pair_id="a")
    second = request_trace(2, start_ms=400, endpoint="vllm-1", turn=1, upstream=True, pair_id="b")
    assert missed_decisions(read_requests([first, second]), 128) == []


def test_the_endpoint_is_who_really_served() -> None:
    trace = changed(
        request_trace(1, endpoint="vllm-2"), "gateway.request", {"llmtrace.endpoint.name": "default/vllm-0"}
    )
    assert read_requests([trace])[0].endpoint == "vllm-2"
    silent = Trace(trace.trace_id, tuple(s for s in trace.spans if s.service != "vllm"))
    assert read_requests([silent])[0].endpoint == "vllm-0"


def test_ties_and_absent_scores_are_told_as_such() -> None:
    tie = Decision(0, (Scorer("queue-scorer", 1.0, {"a": 1.0, "b": 1.0}),), {"a": 1.0, "b": 1.0})
    assert reason(tie, "a", "b") == "equal scores (1.00); the tie fell on a"
    assert "no scores" in reason(None, "a", "b")
    assert "does not tell by which scorer" in reason(Decision(0, (), {"a": 2.0, "b": 1.0}), "a", "b")
