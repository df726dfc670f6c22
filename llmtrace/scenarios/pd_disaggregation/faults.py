"""In what the sources about one request can contradict each other: the picker, the sidecar, the model servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llmtrace.scenarios.pd_disaggregation.choice import SPLIT, UNIFIED
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.scenarios.pd_disaggregation.rule import (
    SPLITTING,
    Decider,
    Reason,
    possible_reasons,
    reason,
    tolerance_tokens,
)

PICKER, SIDECAR, SERVER = "picker", "sidecar", "vllm"
PREFILL_ROLE, DECODE_ROLE = "prefill", "decode"


class Contradiction(NamedTuple):
    """What contradicts, and the component to look at."""

    component: str
    message: str


def way(split: bool) -> str:
    """The word for how a request is served."""
    return SPLIT if split else UNIFIED


def decision_contradiction(request: Handled, roles: Mapping[str, str]) -> Contradiction | None:
    """Whether what the picker decided, the sidecar did and the servers saw is the same thing; ``roles`` by server."""
    choice, legs = request.choice, request.legs
    prefill, decode = legs.prefill, legs.decode
    told = choice.split if "split" not in choice.derived else None
    if told is not None and legs.sidecar_split is not None and told != legs.sidecar_split:
        return Contradiction(SIDECAR, f"the picker decided {way(told)}, the sidecar served it {way(not told)}")
    if prefill is None:
        if legs.sidecar_split and decode is not None:
            return Contradiction(SERVER, "the sidecar says that it split it, but no model server has a prefill leg")
    elif legs.sidecar_split is False or told is False:
        return Contradiction(SIDECAR, f"it is unified, but {prefill.server} has a prefill leg of it")
    elif decode is not None and decode.server == prefill.server:
        return Contradiction(PICKER, f"both of its legs are on {prefill.server}")
    elif roles.get(prefill.server) == DECODE_ROLE:
        return Contradiction(PICKER, f"its prefill leg is on {prefill.server}, a {DECODE_ROLE} server")
    if decode is not None and roles.get(decode.server) == PREFILL_ROLE:
        return Contradiction(PICKER, f"its answer is from {decode.server}, a {PREFILL_ROLE} server")
    return _other_server(request)


def _other_server(request: Handled) -> Contradiction | None:
    choice, legs = request.choice, request.legs
    for field, chosen, engine in (
        ("decode_endpoint", choice.decode_endpoint, legs.decode),
        ("prefill_endpoint", choice.prefill_endpoint, legs.prefill),
    ):
        if field in choice.derived or chosen is None or engine is None or not engine.server:
            continue
        if chosen != engine.server:
            return Contradiction(SIDECAR, f"the picker chose {chosen}, and {engine.server} had the request")
    return None


def rule_contradiction(request: Handled) -> Contradiction | None:
    """Whether the picker's reason follows from the numbers that it gives."""
    choice = request.choice
    if choice.reason is None or choice.split is None or "reason" in choice.derived:
        return None
    if (choice.reason in SPLITTING) != choice.split:
        return Contradiction(PICKER, f"the reason {choice.reason} does not lead to {way(choice.split)}")
    if choice.decider is None or choice.derived & {"decider"} or choice.reason == Reason.NO_DECIDER:
        return None
    # A number that the picker does not give is one that it did not look at.
    cached = None if "cached_tokens" in choice.derived else choice.cached_tokens
    prompt = choice.prompt_tokens or 0
    by_rule = reason(choice.decider, prompt, cached)
    if choice.reason == Reason.NO_PREFILL_ENDPOINT:
        agrees = by_rule in SPLITTING and choice.prefill_candidates in (0, None)
    else:
        agrees = by_rule == choice.reason
    if agrees:
        return None
    numbers = f"{prompt} prompt tokens, {'none known' if cached is None else cached} cached"
    return Contradiction(PICKER, f"the picker says {choice.reason}, its own numbers {by_rule} ({numbers})")


def reason_contradiction(request: Handled, kv_block_size: int) -> Contradiction | None:
    """Whether the reason is one that the rule allows for the model servers' own numbers; see :func:`recomputed`."""
    possible = recomputed(request, kv_block_size)
    choice = request.choice
    if possible is None or choice.reason is None or choice.reason in possible:
        return None
    if choice.reason == Reason.NO_PREFILL_ENDPOINT and choice.prefill_candidates == 0 and possible & set(SPLITTING):
        return None
    if choice.reason == Reason.NO_PREFIX_DATA and "cached_tokens" in choice.derived and possible & set(SPLITTING):
        return None
    believed = "" if choice.cached_tokens is None else f", the picker believed {choice.cached_tokens} cached"
    where = request.legs.decode.server if request.legs.decode else "the decode server"
    return Contradiction(
        PICKER,
        f"the picker says {choice.reason}, recomputed it is {' or '.join(sorted(possible))}: of "
        f"{request.prompt_tokens} prompt tokens {where} had {request.cached_tokens} cached{believed}",
    )


def recomputed(request: Handled, kv_block_size: int) -> frozenset[Reason] | None:
    """The reasons that fit the request and the model servers' own numbers; None where these are not told.

    Nothing in it is the picker's, if the decider is known from the configuration.
    """
    decider: Decider | None = request.configured or request.choice.decider
    prompt, cached = request.prompt_tokens, request.cached_tokens
    if decider is None or prompt is None or cached is None:
        return None
    return possible_reasons(decider, prompt, cached, kv_block_size)


def belief_contradiction(request: Handled, kv_block_size: int) -> Contradiction | None:
    """Whether the picker's uncached tokens are the decode server's, as far as they can be; None if not told."""
    believed, prompt, cached = request.choice.uncached_tokens, request.prompt_tokens, request.cached_tokens
    if believed is None or prompt is None or cached is None:
        return None
    uncached = prompt - cached
    if abs(believed - uncached) <= tolerance_tokens(uncached, kv_block_size):
        return None
    return Contradiction(PICKER, f"the picker believed {believed} tokens not cached, and {uncached} were not")


def load_contradiction(request: Handled, kv_block_size: int) -> Contradiction | None:
    """Whether a split request's KV came as it should: from its prefill server, and all of it."""
    prefill, decode = request.legs.prefill, request.legs.decode
    if prefill is None or decode is None:
        return None
    load = decode.load
    if load is not None and load.failed:
        return Contradiction(SERVER, f"{decode.server} failed to load the KV of {prefill.server}")
    if load is not None and load.remote_engine_id and prefill.engine_id and load.remote_engine_id != prefill.engine_id:
        return Contradiction(SERVER, f"its KV is from {load.remote_engine_id}, its prefill leg was {prefill.engine_id}")
    if decode.computed_tokens is not None and decode.computed_tokens > kv_block_size:
        return Contradiction(
            SERVER, f"{decode.server} computed {decode.computed_tokens} tokens that {prefill.server} had computed"
        )
    return None
