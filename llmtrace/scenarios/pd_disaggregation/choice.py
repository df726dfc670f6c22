"""What the picker chose for a request, and the numbers behind it.

The kit's picker tells them on ``prepare_disaggregation``. llm-d's own leaves them out: then they are derived from other
spans and from the decider's configuration, and named as derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from llmtrace.scenarios.facts import Served, integer, short_name, text
from llmtrace.scenarios.pd_disaggregation.legs import Legs
from llmtrace.scenarios.pd_disaggregation.rule import ALWAYS_DECIDER, SPLITTING, Decider, Reason, decider_of, reason
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes, Trace

PREFILL_PROFILE = "prefill"
PREFIX_SCORER = "prefix-cache-scorer"
SPLIT, UNIFIED = "split", "unified"

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """The picker's choice. Tokens as the picker counts them; None where neither it nor another span tells.

    ``decode_endpoint`` and ``prefill_endpoint`` are names without namespace, the ``waiting`` are requests in their
    queues. ``prefill_candidates`` are the endpoints that the prefill profile's filters left, None where it did not run.
    ``derived`` names the fields that the picker does not tell itself.
    """

    split: bool | None = None
    reason: Reason | None = None
    decider: Decider | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    decode_endpoint: str | None = None
    prefill_endpoint: str | None = None
    decode_waiting: int | None = None
    prefill_waiting: int | None = None
    prefill_candidates: int | None = None
    derived: frozenset[str] = frozenset()

    @property
    def uncached_tokens(self) -> int | None:
        """Prompt tokens that the decode server would have to prefill."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return max(self.prompt_tokens - self.cached_tokens, 0)


class _Sources:
    """Takes what the picker tells, else the first other source, and notes that it did."""

    def __init__(self) -> None:
        self.derived: set[str] = set()

    def first(self, field: str, told: T | None, *others: T | None) -> T | None:
        if told is not None:
            return told
        found = next((other for other in others if other is not None), None)
        if found is not None:
            self.derived.add(field)
        return found


def read_choice(trace: Trace, served: Served, legs: Legs, configured: Decider | None) -> Choice:
    """The choice; ``configured`` is the decider of the request's arm, where that is known."""
    span = next(iter(trace.named(a.PD_SPAN)), None)
    told: Attributes = span.attributes if span else {}
    sources = _Sources()
    decision = text(told.get(a.PD_DECISION))
    used = told.get(a.EPP_PD_USED)
    split = sources.first(
        "split",
        decision == SPLIT if decision else used if isinstance(used, bool) else None,
        legs.sidecar_split,
        legs.prefill is not None,
    )
    decider = sources.first("decider", decider_of(told), configured)
    decode = sources.first("decode_endpoint", _name(told, a.PD_DECODE_ENDPOINT), served.endpoint)
    prefill = sources.first(
        "prefill_endpoint", _name(told, a.PD_PREFILL_ENDPOINT), legs.prefill.server if legs.prefill else None
    )
    estimate = served.decision.prompt_tokens if served.decision else None
    prompt = sources.first(
        "prompt_tokens",
        integer(told.get(a.PD_PROMPT_TOKENS)),
        estimate,
        served.input_tokens,
        served.server_prompt_tokens,
    )
    cached = sources.first(
        "cached_tokens",
        integer(told.get(a.PD_CACHED_TOKENS)),
        _matched(served, decode, prompt),
        legs.decode.local_cached_tokens if legs.decode else None,
        None if split else served.cached_tokens,
    )
    candidates = _prefill_candidates(trace)
    return Choice(
        split=split,
        reason=sources.first("reason", _reason(told), _derived_reason(split, decider, prompt, cached, candidates)),
        decider=decider,
        prompt_tokens=prompt,
        cached_tokens=cached,
        decode_endpoint=decode,
        prefill_endpoint=prefill,
        decode_waiting=integer(told.get(a.PD_DECODE_WAITING)),
        prefill_waiting=integer(told.get(a.PD_PREFILL_WAITING)),
        prefill_candidates=candidates,
        derived=frozenset(sources.derived),
    )


def _name(told: Attributes, attribute: str) -> str | None:
    return short_name(text(told.get(attribute))) or None


def _reason(told: Attributes) -> Reason | None:
    value = text(told.get(a.PD_REASON))
    return Reason(value) if value in set(Reason) else None


def _matched(served: Served, decode: str | None, prompt: int | None) -> int | None:
    """Tokens of the prompt that the decode profile's prefix-cache-scorer believes cached on the decode endpoint.

    llm-d's scorer tells the share only of the best endpoint and the mean: of this one where all are equal.
    """
    decision = served.decision
    if decision is None or decode is None:
        return None
    if decision.match_tokens is not None:
        return decision.match_tokens.get(decode)
    scorer = next((s for s in decision.scorers if s.type == PREFIX_SCORER), None)
    if scorer is None or scorer.best is None or scorer.mean is None or prompt is None:
        return None
    return round(scorer.best * prompt) if abs(scorer.best - scorer.mean) < 1e-9 else None


def _prefill_candidates(trace: Trace) -> int | None:
    for profile in trace.named(a.PROFILE_SPAN):
        if profile.attributes.get(a.PROFILE_NAME) == PREFILL_PROFILE:
            filters = (s for s in trace.children(profile) if s.name == a.FILTER_SPAN)
            return next((integer(s.attributes.get(a.FILTER_REMAINING)) for s in filters), None)
    return None


def _derived_reason(
    split: bool | None, decider: Decider | None, prompt: int | None, cached: int | None, candidates: int | None
) -> Reason | None:
    """The reason that the rule gives for what was chosen; None where the decider or the prompt is not known."""
    if split is None or decider is None:
        return None
    always = decider.type == ALWAYS_DECIDER
    if split:
        return Reason.ALWAYS if always else Reason.ABOVE_THRESHOLD
    if always or candidates == 0:
        return Reason.NO_PREFILL_ENDPOINT
    if decider.threshold_tokens == 0:
        return Reason.SPLITTING_DISABLED
    if prompt is None:
        return None
    by_rule = reason(decider, prompt, cached)
    # The picker did not split, so that by its own count of tokens the threshold was not reached.
    return Reason.BELOW_THRESHOLD if by_rule in SPLITTING else by_rule
