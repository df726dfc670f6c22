"""Routing decisions that passed over an endpoint with a warmer cache, why, and what each cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Decision, Served

Source = Literal["picker", "derived"]
"""Whence the warmth of endpoints is known: the picker's span, or derived from the run's earlier traces."""


class MissedDecision(BaseModel):
    """A request that was prefilled on an endpoint although another one held more of its prompt.

    ``warmer_tokens`` is what the warmer endpoint would have taken from its cache, in whole KV blocks;
    ``avoidable_tokens`` is what was prefilled for want of it: warmer_tokens less the tokens that really came
    from the chosen one's cache.
    """

    model_config = ConfigDict(frozen=True)
    trace_id: str
    arm: str
    block: int
    tenant: str
    turn: int
    chosen: str
    warmer: str
    prompt_tokens: int
    cached_tokens: int
    warmer_tokens: int
    avoidable_tokens: int
    ttft_ms: float | None
    source: Source
    reason: str


def missed_decisions(served: Sequence[Served], kv_block_size: int) -> list[MissedDecision]:
    """The missed decisions of a run, the most expensive first."""
    shared = _shared_context(served)
    missed = [m for s in served if (m := _missed(s, served, shared, kv_block_size)) is not None]
    return sorted(missed, key=lambda m: (-m.avoidable_tokens, m.trace_id))


def _missed(
    request: Served, served: Sequence[Served], shared: dict[str, int], kv_block_size: int
) -> MissedDecision | None:
    prompt, cached, chosen = request.input_tokens, request.cached_tokens, request.endpoint
    if prompt is None or cached is None or chosen is None or request.failed:
        return None
    source, warmth = _warmth(request, prompt, served, shared)
    others = {e: t for e, t in warmth.items() if e != chosen}
    if not others:
        return None
    warmer = max(others, key=lambda e: (others[e], e))
    # vLLM caches whole blocks, and always computes at least the prompt's last token.
    available = min(others[warmer], prompt - 1) // kv_block_size * kv_block_size
    if available - cached < kv_block_size:
        return None
    return MissedDecision(
        trace_id=request.trace_id,
        arm=request.arm,
        block=request.block,
        tenant=request.tenant,
        turn=request.turn,
        chosen=chosen,
        warmer=warmer,
        prompt_tokens=prompt,
        cached_tokens=cached,
        warmer_tokens=available,
        avoidable_tokens=available - cached,
        ttft_ms=request.ttft_ms,
        source=source,
        reason=reason(request.decision, chosen, warmer),
    )


def _warmth(
    request: Served, prompt: int, served: Sequence[Served], shared: dict[str, int]
) -> tuple[Source, dict[str, int]]:
    """Prompt tokens that each endpoint held when the request was routed, in the model's own tokens."""
    decision = request.decision
    if decision is not None and decision.match_tokens is not None and decision.prompt_tokens:
        scale = prompt / decision.prompt_tokens
        return "picker", {e: int(t * scale) for e, t in decision.match_tokens.items()}
    return "derived", _derived_warmth(request, served, shared)


def _derived_warmth(request: Served, served: Sequence[Served], shared: dict[str, int]) -> dict[str, int]:
    """As :func:`_warmth`, from the requests of the same block whose first token was out by then."""
    warmth: dict[str, int] = {}
    for earlier in served:
        if (earlier.arm, earlier.block, earlier.tenant) != (request.arm, request.block, request.tenant):
            continue
        if earlier.endpoint is None or earlier.ttft_ms is None or earlier.input_tokens is None:
            continue
        if earlier.start_ns + earlier.ttft_ms * 1e6 > request.start_ns:
            continue
        same_chat = earlier.conversation == request.conversation and earlier.turn < request.turn
        tokens = earlier.input_tokens if same_chat else shared.get(request.tenant, 0)
        warmth[earlier.endpoint] = max(warmth.get(earlier.endpoint, 0), tokens)
    return warmth


def _shared_context(served: Sequence[Served]) -> dict[str, int]:
    """For each tenant the least that a chat's first turn ever took from a cache: what all chats share."""
    shared: dict[str, int] = {}
    for s in served:
        if s.turn == 0 and s.cached_tokens:
            shared[s.tenant] = min(shared.get(s.tenant, s.cached_tokens), s.cached_tokens)
    return shared


def reason(decision: Decision | None, chosen: str, warmer: str) -> str:
    """In one phrase why the chosen endpoint was preferred to the warmer one."""
    if decision is None or chosen not in decision.totals or warmer not in decision.totals:
        return "the trace holds no scores of both endpoints"
    ours, theirs = decision.totals[chosen], decision.totals[warmer]
    if ours < theirs - 1e-9:
        return f"the picker did not follow the scores ({warmer} {theirs:.2f}, {chosen} {ours:.2f})"
    if ours <= theirs + 1e-9:
        return f"equal scores ({ours:.2f}); the tie fell on {chosen}"
    gains = {
        s.type: s.weight * (s.scores.get(chosen, 0.0) - s.scores.get(warmer, 0.0)) for s in decision.scorers if s.scores
    }
    if not gains:
        return f"{chosen} scored {ours:.2f}, {warmer} {theirs:.2f}; the trace does not tell by which scorer"
    leader = max(gains, key=lambda name: gains[name])
    return f"{leader} gave {chosen} {gains[leader]:+.2f} (in all {ours:.2f} to {theirs:.2f})"
