"""The answer of the prefix-cache scenario, computed from the traces of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError
from llmtrace.scenarios.checks import Check, Prefilled, counters, equal, every_request_has_its_trace
from llmtrace.scenarios.facts import Block, Served, kv_block_size_of, read_blocks, read_requests
from llmtrace.scenarios.pairing import Conclusion, by_pair, conclude
from llmtrace.scenarios.prefix_cache.expected import ARMS, BASELINE, CANDIDATE
from llmtrace.scenarios.prefix_cache.routing import MissedDecision, missed_decisions
from llmtrace.stats import Distribution, Interval, cluster_bootstrap, distribution
from llmtrace.traces.model import Trace


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class EndpointShare(_Model):
    """Tokens of one arm at one endpoint; ``counter_*`` are the increases of vLLM's own counters."""

    endpoint: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    hit_share: float
    counter_hits: int | None
    counter_queries: int | None


class ArmAnswer(_Model):
    """One arm. Latencies in milliseconds; TTFT and TPOT as the client saw them."""

    arm: str
    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    hit_share: float
    endpoints: list[EndpointShare]
    ttft: Distribution | None
    ttft_first_turns: Distribution | None
    ttft_later_turns: Distribution | None
    ttft_gateway: Distribution | None
    ttft_server: Distribution | None
    tpot: Distribution | None
    missed_decisions: int
    avoidable_tokens: int


class PairedTtft(_Model):
    """One request in both arms; TTFT in milliseconds."""

    pair_id: str
    block: int
    tenant: str
    turn: int
    candidate_ms: float
    baseline_ms: float
    candidate_trace_id: str
    baseline_trace_id: str


class Comparison(_Model):
    """The same requests in both arms. Both intervals are 95 % bootstrap intervals over (block, tenant)
    clusters.

    ``saved_ms`` is the mean of baseline less candidate; ``ratio`` the median of candidate over baseline. The
    conclusion is drawn from ``saved_ms``: an improvement when its interval lies above zero, a regression when
    below.
    """

    candidate: str
    baseline: str
    pairs: int
    clusters: int
    saved_ms: Interval
    ratio: Interval
    conclusion: Conclusion


class PrefixCacheAnswer(_Model):
    """The whole answer."""

    scenario: Literal["prefix-cache"] = "prefix-cache"
    run_id: str
    model: str
    kv_block_size: int
    arms: list[ArmAnswer]
    comparison: Comparison | None
    verdict: str
    checks: list[Check]
    missed: list[MissedDecision]
    notes: list[str]
    pairs: list[PairedTtft]


def answer(run_id: str, traces: Iterable[Trace], *, seed: int = 0) -> PrefixCacheAnswer:
    """Compute the answer from the traces of a run; ``seed`` is that of the bootstrap.

    Raises UserError when the traces hold no measured request.
    """
    traces = list(traces)
    blocks, served = read_blocks(traces), read_requests(traces)
    if not served:
        raise UserError(f"the store has no measured requests of run {run_id}; run `llmtrace run prefix-cache` again")
    kv_block_size, notes = kv_block_size_of(blocks)
    missed = missed_decisions(served, kv_block_size)
    if any(m.source == "derived" for m in missed):
        notes.append(
            "the picker's spans do not tell which endpoint held how much of a prompt, so warmer endpoints are"
            " derived from earlier requests of the same block"
        )
    if unrouted := sum(s.endpoint is None for s in served):
        notes.append(f"{unrouted} requests do not tell which endpoint served them and are in no endpoint's figures")
    pairs = paired(served)
    comparison = compare(pairs, seed)
    checks = _checks(served, blocks, kv_block_size)
    disagreeing = [check.name for check in checks if check.ok is False]
    if comparison is not None and disagreeing:
        comparison = comparison.model_copy(update={"conclusion": "not supported"})
    return PrefixCacheAnswer(
        run_id=run_id,
        model=next((b.model for b in blocks), ""),
        kv_block_size=kv_block_size,
        arms=[_arm(arm, served, blocks, missed) for arm in ARMS],
        comparison=comparison,
        verdict=_verdict(comparison, pairs, disagreeing),
        checks=checks,
        missed=missed,
        notes=notes,
        pairs=pairs,
    )


def paired(served: Iterable[Served]) -> list[PairedTtft]:
    """Requests that gave a first token in both arms."""
    return [
        PairedTtft(
            pair_id=pair_id,
            block=c.block,
            tenant=c.tenant,
            turn=c.turn,
            candidate_ms=c.ttft_ms or 0.0,
            baseline_ms=b.ttft_ms or 0.0,
            candidate_trace_id=c.trace_id,
            baseline_trace_id=b.trace_id,
        )
        for pair_id, arms in by_pair(served).items()
        if (c := arms.get(CANDIDATE)) is not None and (b := arms.get(BASELINE)) is not None
    ]


def compare(pairs: Sequence[PairedTtft], seed: int) -> Comparison | None:
    """The paired comparison, or None with fewer than two clusters of pairs."""
    clusters = [(p.block, p.tenant) for p in pairs]
    if len(set(clusters)) < 2:
        return None

    def mean(values: NDArray[np.float64]) -> float:
        return float(values.mean())

    def middle(values: NDArray[np.float64]) -> float:
        return float(np.median(values))

    saved = cluster_bootstrap([p.baseline_ms - p.candidate_ms for p in pairs], clusters, mean, seed=seed)
    ratio = cluster_bootstrap([p.candidate_ms / p.baseline_ms for p in pairs], clusters, middle, seed=seed)
    return Comparison(
        candidate=CANDIDATE,
        baseline=BASELINE,
        pairs=len(pairs),
        clusters=len(set(clusters)),
        saved_ms=saved,
        ratio=ratio,
        conclusion=conclude(saved),
    )


def _verdict(comparison: Comparison | None, pairs: Sequence[PairedTtft], disagreeing: Sequence[str]) -> str:
    if comparison is None:
        return f"{len(pairs)} complete pairs are too few to compare the arms; run more blocks."
    if disagreeing:
        return f"The sources disagree ({'; '.join(disagreeing)}), so no conclusion is drawn."
    saved, ratio = comparison.saved_ms, comparison.ratio
    interval = f"95 % interval {saved.low:+.0f} to {saved.high:+.0f} ms, {comparison.pairs} pairs"
    if comparison.conclusion == "not supported":
        return (
            f"The evidence does not support that prefix-aware routing improves TTFT: mean saving"
            f" {saved.estimate:+.0f} ms, but its {interval}, includes zero."
        )
    before, after = median(p.baseline_ms for p in pairs), median(p.candidate_ms for p in pairs)
    word = "improves" if comparison.conclusion == "improvement" else "worsens"
    return (
        f"Prefix-aware routing {word} TTFT over random routing: mean saving {saved.estimate:+.0f} ms"
        f" ({interval}); median {before:.0f} ms to {after:.0f} ms. The median request took"
        f" {ratio.estimate:.0%} of its TTFT under random routing"
        f" (95 % interval {ratio.low:.0%} to {ratio.high:.0%})."
    )


def _share(cached: int, prompt: int) -> float:
    return cached / prompt if prompt else 0.0


def _sum(served: Iterable[Served], value: Callable[[Served], int | None]) -> int:
    return sum(value(s) or 0 for s in served)


def _arm(arm: str, served: Sequence[Served], blocks: Sequence[Block], missed: Sequence[MissedDecision]) -> ArmAnswer:
    mine = [s for s in served if s.arm == arm]
    good = [s for s in mine if not s.failed]
    prompt, cached = _sum(good, lambda s: s.input_tokens), _sum(good, lambda s: s.cached_tokens)
    missed_here = [m for m in missed if m.arm == arm]
    counters = [b for b in blocks if b.arm == arm]
    names = {s.endpoint for s in good if s.endpoint} | {n for b in counters for n in b.hits}

    def ttft(keep: Callable[[Served], bool]) -> Distribution | None:
        return distribution([s.ttft_ms for s in good if s.ttft_ms is not None and keep(s)])

    return ArmAnswer(
        arm=arm,
        requests=len(mine),
        failed=len(mine) - len(good),
        prompt_tokens=prompt,
        cached_tokens=cached,
        hit_share=_share(cached, prompt),
        endpoints=[_endpoint(name, good, counters) for name in sorted(names)],
        ttft=ttft(lambda s: True),
        ttft_first_turns=ttft(lambda s: s.turn == 0),
        ttft_later_turns=ttft(lambda s: s.turn > 0),
        ttft_gateway=distribution([s.gateway_ttft_ms for s in good if s.gateway_ttft_ms is not None]),
        ttft_server=distribution([s.server_ttft_ms for s in good if s.server_ttft_ms is not None]),
        tpot=distribution([t for s in good if (t := s.tpot_ms) is not None]),
        missed_decisions=len(missed_here),
        avoidable_tokens=sum(m.avoidable_tokens for m in missed_here),
    )


def _endpoint(name: str, served: Iterable[Served], counters: Iterable[Block]) -> EndpointShare:
    here = [s for s in served if s.endpoint == name]
    counted = [b for b in counters if name in b.hits]
    prompt, cached = _sum(here, lambda s: s.input_tokens), _sum(here, lambda s: s.cached_tokens)
    return EndpointShare(
        endpoint=name,
        requests=len(here),
        prompt_tokens=prompt,
        cached_tokens=cached,
        hit_share=_share(cached, prompt),
        counter_hits=sum(b.hits[name] for b in counted) if counted else None,
        counter_queries=sum(b.queries[name] for b in counted) if counted else None,
    )


def _checks(served: Sequence[Served], blocks: Sequence[Block], kv_block_size: int) -> list[Check]:
    good = [s for s in served if not s.failed]
    return [
        every_request_has_its_trace(served, blocks),
        equal(
            "cached tokens: client's usage and gateway's",
            good,
            lambda s: (s.cached_tokens, s.gateway_cached_tokens),
        ),
        equal(
            "prompt tokens: client's usage and vLLM's span",
            good,
            lambda s: (s.input_tokens, s.server_prompt_tokens),
        ),
        counters(
            "cached tokens: client's usage and vLLM's counters",
            "usage says",
            (Prefilled(s.arm, s.block, s.endpoint, s.input_tokens or 0, s.cached_tokens or 0) for s in good),
            blocks,
            kv_block_size,
        ),
    ]
