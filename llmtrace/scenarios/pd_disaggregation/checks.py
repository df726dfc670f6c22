"""The checks of the pd-disaggregation answer: do its sources agree?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmtrace.scenarios.checks import Check, Prefilled, check, counters, equal, every_request_has_its_trace
from llmtrace.scenarios.facts import Block
from llmtrace.scenarios.pd_disaggregation.faults import (
    Contradiction,
    belief_contradiction,
    decision_contradiction,
    load_contradiction,
    reason_contradiction,
    recomputed,
    rule_contradiction,
)
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.scenarios.pd_disaggregation.rule import ESTIMATE_SHARE, PICKER_BLOCK_TOKENS


def run_checks(
    requests: Sequence[Handled], blocks: Sequence[Block], kv_block_size: int
) -> tuple[list[Check], list[str]]:
    """All checks, and the names of those that fail and without which no conclusion can be drawn.

    What the picker believes of a cache may be wrong without any harm to the comparison of arms.
    """
    good = [r for r in requests if not r.served.failed]
    served = [r.served for r in good]
    roles = {server: role for b in blocks for server, role in b.roles.items()}
    tolerance = f"within {ESTIMATE_SHARE:.0%} and {PICKER_BLOCK_TOKENS} + {kv_block_size} tokens".replace("%", " %")
    needed = [
        every_request_has_its_trace([r.served for r in requests], blocks),
        _contradictions(
            "decision: picker, sidecar and the servers' legs",
            good,
            lambda r: decision_contradiction(r, roles),
            lambda r: r.legs.sidecar_split is not None or r.legs.decode is not None,
            "the same for every request",
        ),
        equal(
            "prompt tokens: client's usage and vLLM's spans", served, lambda s: (s.input_tokens, s.server_prompt_tokens)
        ),
    ]
    others = [
        _cached(good),
        _counters(good, blocks, kv_block_size),
        _contradictions(
            "KV of split requests: prefill leg and kv_load",
            good,
            lambda r: load_contradiction(r, kv_block_size),
            lambda r: r.legs.prefill is not None and r.legs.decode is not None,
            "each decode server got the KV of its prefill leg, and computed less than a block of the prompt",
        ),
        _contradictions(
            "uncached tokens: picker's belief and vLLM's spans",
            good,
            lambda r: belief_contradiction(r, kv_block_size),
            lambda r: None not in (r.choice.uncached_tokens, r.prompt_tokens, r.cached_tokens),
            f"{tolerance} for every request",
        ),
        _contradictions(
            "reason: the rule on the picker's own numbers",
            good,
            rule_contradiction,
            lambda r: r.choice.reason is not None and "reason" not in r.choice.derived,
            "the same for every request",
        ),
        _contradictions(
            "reason: recomputed from request, configuration and vLLM's spans",
            good,
            lambda r: reason_contradiction(r, kv_block_size),
            lambda r: recomputed(r, kv_block_size) is not None and r.choice.reason is not None,
            f"the same for every request, tokens {tolerance}",
            _undecided(good, kv_block_size),
        ),
    ]
    return needed + others, [c.name for c in needed if c.ok is False]


def _contradictions(
    name: str,
    requests: Sequence[Handled],
    contradiction: Callable[[Handled], Contradiction | None],
    told: Callable[[Handled], bool],
    agreement: str,
    note: str = "",
) -> Check:
    able = [r for r in requests if told(r)]
    differ = [
        f"{r.served.trace_id} ({r.served.arm}): {found.message}"
        for r in able
        if (found := contradiction(r)) is not None
    ]
    return check(name, len(able), differ, agreement, note)


def _undecided(requests: Sequence[Handled], kv_block_size: int) -> str:
    """How many requests were so near the threshold that the tolerance allows either reason."""
    near = sum(len(possible) > 1 for r in requests if (possible := recomputed(r, kv_block_size)) is not None)
    return f"{near} so near the threshold that either is right" if near else ""


def _cached(requests: Sequence[Handled]) -> Check:
    """The client's count of cached tokens. For a split request it is the prefill leg's, or all that was not computed.

    llm-d's sidecar puts the prefill leg's count into the usage; without that, it is the decode leg's.
    """
    differ, compared = [], 0
    for r in requests:
        usage, decode, prefill = r.served.cached_tokens, r.legs.decode, r.legs.prefill
        if usage is None or decode is None or decode.local_cached_tokens is None:
            continue
        allowed = {decode.local_cached_tokens + (decode.external_cached_tokens or 0)}
        if prefill is not None and prefill.local_cached_tokens is not None:
            allowed.add(prefill.local_cached_tokens)
        compared += 1
        if usage not in allowed:
            words = " or ".join(map(str, sorted(allowed)))
            differ.append(f"{r.served.trace_id} ({r.served.arm}): {usage} and {words}")
    return check("cached tokens: client's usage and vLLM's spans", compared, differ, "equal for every request")


def _counters(requests: Sequence[Handled], blocks: Sequence[Block], kv_block_size: int) -> Check:
    """What each server looked up in its cache, leg by leg; all legs must tell it."""
    legs = [(r.served, e) for r in requests for e in (r.legs.prefill, r.legs.decode) if e is not None]
    told = [
        Prefilled(served.arm, served.block, engine.server, engine.prompt_tokens, engine.local_cached_tokens)
        for served, engine in legs
        if engine.prompt_tokens is not None and engine.local_cached_tokens is not None
    ]
    name = "cached tokens: vLLM's spans and vLLM's counters"
    return counters(name, "its spans say", told, blocks if len(told) == len(legs) else [], kv_block_size)
