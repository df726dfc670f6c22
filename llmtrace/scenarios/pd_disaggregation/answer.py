"""The answer of the pd-disaggregation scenario, computed from the traces of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError
from llmtrace.scenarios.checks import Check
from llmtrace.scenarios.facts import kv_block_size_of, read_blocks
from llmtrace.scenarios.pd_disaggregation.arms import ARMS, BY_THRESHOLD, NAME
from llmtrace.scenarios.pd_disaggregation.checks import run_checks
from llmtrace.scenarios.pd_disaggregation.latency import (
    ArmAnswer,
    ArmComparison,
    TtftParts,
    arm_answer,
    compare_arms,
    ttft_parts,
)
from llmtrace.scenarios.pd_disaggregation.regret import (
    METRICS,
    ReasonRegret,
    ThresholdAnswer,
    Triple,
    best_threshold,
    reason_regrets,
    triples,
)
from llmtrace.scenarios.pd_disaggregation.requests import Handled, read_handled
from llmtrace.scenarios.pd_disaggregation.rule import Reason
from llmtrace.scenarios.pd_disaggregation.sentence import sentence
from llmtrace.scenarios.pd_disaggregation.transfer import TransferTotal, transfer_totals
from llmtrace.scenarios.pd_disaggregation.verdict import verdict
from llmtrace.stats import Distribution, distribution
from llmtrace.traces.model import Trace


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class RequestAnswer(_Model):
    """One request. Tokens as the picker counts them, times in ms; None where the trace does not tell.

    ``derived`` names the numbers that the picker does not tell itself. ``lost_ttft_ms`` and ``lost_e2e_ms``, of the
    arm by-threshold, are what the choice lost against the other one, as the forced arms show them.
    """

    trace_id: str
    arm: str
    block: int
    pair_id: str
    tenant: str
    split: bool
    reason: Reason | None
    sentence: str
    prompt_tokens: int | None
    cached_tokens: int | None
    uncached_tokens: int | None
    threshold_tokens: int | None
    decode_server: str | None
    prefill_server: str | None
    derived: list[str]
    ttft_ms: float | None
    e2e_ms: float | None
    kv_bytes: int | None
    kv_wait_ms: float | None
    lost_ttft_ms: float | None = None
    lost_e2e_ms: float | None = None


class ReasonTotal(_Model):
    """The requests of one arm that were served in one way for one reason; tokens as the picker counts them."""

    arm: str
    split: bool
    reason: Reason | None
    requests: int
    prompt_tokens: int
    uncached_tokens: int
    ttft: Distribution | None
    e2e: Distribution | None


class PdAnswer(_Model):
    """The whole answer."""

    scenario: Literal["pd-disaggregation"] = "pd-disaggregation"
    run_id: str
    model: str
    kv_block_size: int
    arms: list[ArmAnswer]
    reasons: list[ReasonTotal]
    transfers: list[TransferTotal]
    ttft_parts: list[TtftParts]
    comparisons: list[ArmComparison]
    regrets: list[ReasonRegret]
    thresholds: list[ThresholdAnswer]
    verdict: str
    supported: bool
    checks: list[Check]
    notes: list[str]
    requests: list[RequestAnswer]


def answer(run_id: str, traces: Iterable[Trace], *, seed: int = 0) -> PdAnswer:
    """Compute the answer from the traces of a run; ``seed`` is that of the bootstrap.

    Raises UserError when the traces hold no measured request.
    """
    traces = list(traces)
    blocks = read_blocks(traces)
    requests = [r for r in read_handled(traces, blocks) if r.served.arm in ARMS]
    if not requests:
        raise UserError(f"the store has no measured requests of run {run_id}; run `llmtrace run {NAME}` again")
    kv_block_size, notes = kv_block_size_of(blocks)
    good = [r for r in requests if not r.served.failed]
    found = triples(good)
    comparisons = compare_arms([r.served for r in good], seed)
    thresholds = [t for metric in METRICS if (t := best_threshold(found, metric, seed)) is not None]
    checks, disagreeing = run_checks(requests, blocks, kv_block_size)
    said, supported = verdict(comparisons, thresholds, disagreeing)
    return PdAnswer(
        run_id=run_id,
        model=next((b.model for b in blocks), ""),
        kv_block_size=kv_block_size,
        arms=[arm_answer(arm, requests) for arm in ARMS],
        reasons=_reasons(good),
        transfers=transfer_totals(good),
        ttft_parts=ttft_parts(good),
        comparisons=comparisons,
        regrets=reason_regrets(found, seed),
        thresholds=thresholds,
        verdict=said,
        supported=supported,
        checks=checks,
        notes=[*notes, *_notes(good, found)],
        requests=_listed(good, found),
    )


def _reasons(requests: Sequence[Handled]) -> list[ReasonTotal]:
    groups: dict[tuple[str, bool, Reason | None], list[Handled]] = {}
    for r in requests:
        groups.setdefault((r.served.arm, r.was_split, r.choice.reason), []).append(r)
    return [
        ReasonTotal(
            arm=arm,
            split=split,
            reason=reason,
            requests=len(group),
            prompt_tokens=sum(r.choice.prompt_tokens or 0 for r in group),
            uncached_tokens=sum(r.choice.uncached_tokens or 0 for r in group),
            ttft=distribution([r.served.ttft_ms for r in group if r.served.ttft_ms is not None]),
            e2e=distribution([r.served.e2e_ms for r in group if r.served.e2e_ms is not None]),
        )
        for (arm, split, reason), group in sorted(
            groups.items(), key=lambda item: (ARMS.index(item[0][0]), not item[0][1], item[0][2] or "")
        )
    ]


def _listed(requests: Sequence[Handled], found: Sequence[Triple]) -> list[RequestAnswer]:
    by_trace = {t.chosen.served.trace_id: t for t in found}
    return [_request(r, by_trace.get(r.served.trace_id)) for r in requests]


def _request(r: Handled, triple: Triple | None) -> RequestAnswer:
    decode, prefill, choice = r.legs.decode, r.legs.prefill, r.choice
    load = decode.load if decode else None
    return RequestAnswer(
        trace_id=r.served.trace_id,
        arm=r.served.arm,
        block=r.served.block,
        pair_id=r.served.pair_id,
        tenant=r.served.tenant,
        split=r.was_split,
        reason=choice.reason,
        sentence=sentence(r),
        prompt_tokens=choice.prompt_tokens,
        cached_tokens=choice.cached_tokens,
        uncached_tokens=choice.uncached_tokens,
        threshold_tokens=choice.decider.threshold_tokens if choice.decider else None,
        decode_server=decode.server if decode else choice.decode_endpoint,
        prefill_server=prefill.server if prefill else choice.prefill_endpoint,
        derived=sorted(choice.derived),
        ttft_ms=r.served.ttft_ms,
        e2e_ms=r.served.e2e_ms,
        kv_bytes=load.bytes if load else None,
        kv_wait_ms=load.wait_ms if load else None,
        lost_ttft_ms=triple.lost("ttft") if triple else None,
        lost_e2e_ms=triple.lost("e2e") if triple else None,
    )


def _notes(requests: Sequence[Handled], found: Sequence[Triple]) -> Iterator[str]:
    mine = [r for r in requests if r.served.arm == BY_THRESHOLD]
    if any("reason" in r.choice.derived for r in mine):
        yield (
            "the picker's spans do not tell the numbers behind its choices; those marked [derived] are from the"
            " scorer's match, the model servers' counts and the arm's configuration"
        )
    if unknown := sum(r.choice.reason is None for r in requests):
        yield f"{unknown} requests do not tell why they were served as they were"
    if silent := sum(r.legs.decode is None or r.legs.decode.prefill_ms is None for r in requests):
        yield f"{silent} requests lack the spans inside the model server that answered them"
    if lost := len(mine) - len(found):
        yield f"{lost} requests of {BY_THRESHOLD} have no counterpart in both other arms: their choice is not judged"
