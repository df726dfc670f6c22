"""One sentence about one request: how it was served, why, and what that took."""

from __future__ import annotations

from llmtrace.scenarios.pd_disaggregation.choice import Choice
from llmtrace.scenarios.pd_disaggregation.faults import way
from llmtrace.scenarios.pd_disaggregation.legs import Load
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.scenarios.pd_disaggregation.rule import Reason
from llmtrace.scenarios.pd_disaggregation.transfer import ttft_share
from llmtrace.units import bytes_text

DERIVED = " [derived]"
"""Follows a number that the picker does not tell itself."""


def sentence(request: Handled) -> str:
    """The sentence, without a full stop."""
    parts = [_why(request.choice), _waiting(request.choice), _took(request)]
    return f"{way(request.was_split)}: {'; '.join(part for part in parts if part)}"


def _why(choice: Choice) -> str:
    tokens = _tokens(choice)
    match choice.reason:
        case Reason.ABOVE_THRESHOLD | Reason.BELOW_THRESHOLD:
            return f"{tokens} ({_threshold(choice)})"
        case Reason.PROMPT_BELOW_MINIMUM:
            minimum = choice.decider.minimum_prompt_tokens if choice.decider else 0
            return f"the prompt has {_number(choice, 'prompt_tokens')} tokens, less than the minimum of {minimum:,}"
        case Reason.SPLITTING_DISABLED:
            return f"splitting is switched off, {tokens}"
        case Reason.ALWAYS:
            return f"every request is split, {tokens}"
        case Reason.NO_PREFILL_ENDPOINT:
            return f"there was no prefill endpoint, {tokens}"
        case Reason.NO_PREFIX_DATA:
            return f"the picker knew nothing of the cache of {_decode(choice)}, {tokens} ({_threshold(choice)})"
        case Reason.NO_DECIDER:
            return f"no decider is configured, {tokens}"
        case None:
            return f"the trace does not tell why, {tokens}"


def _number(choice: Choice, field: str) -> str:
    value = getattr(choice, field)
    if value is None:
        return "an unknown number of"
    return f"{value:,}" + (DERIVED if field in choice.derived else "")


def _decode(choice: Choice) -> str:
    return choice.decode_endpoint or "the decode server"


def _tokens(choice: Choice) -> str:
    uncached = choice.uncached_tokens
    prompt = _number(choice, "prompt_tokens")
    if uncached is None:
        return f"{prompt} prompt tokens"
    derived = DERIVED if choice.derived & {"prompt_tokens", "cached_tokens"} else ""
    return f"{uncached:,}{derived} of {prompt} prompt tokens were not cached on {_decode(choice)}"


def _threshold(choice: Choice) -> str:
    if choice.decider is None:
        return "threshold unknown"
    return f"threshold {choice.decider.threshold_tokens:,}" + (DERIVED if "decider" in choice.derived else "")


def _waiting(choice: Choice) -> str:
    queues = (
        (choice.decode_waiting, _decode(choice)),
        (choice.prefill_waiting, choice.prefill_endpoint or "the prefill server"),
    )
    told = [f"{waiting} at {name}" for waiting, name in queues if waiting is not None]
    return f"waiting: {', '.join(told)}" if told else ""


def _took(request: Handled) -> str:
    prefill, decode = request.legs.prefill, request.legs.decode
    worked = prefill if request.was_split else decode
    parts = []
    if worked is not None and worked.prefill_ms is not None:
        parts.append(f"prefill on {worked.server} took {worked.prefill_ms:,.0f} ms")
    if request.was_split and decode is not None and decode.prefill_ms is not None:
        parts.append(_moved(request, decode.load) if decode.load else "no KV was transferred")
    return ", ".join(parts) or "the trace does not tell what the model servers did"


def _moved(request: Handled, load: Load) -> str:
    size = f" {bytes_text(load.bytes)}" if load.bytes is not None else ""
    alone = f" ({load.transfer_ms:,.0f} ms of it the transfer alone)" if load.transfer_ms is not None else ""
    share = ttft_share(request)
    of_ttft = "" if share is None else f", {share:.1%} of TTFT".replace("%", " %")
    word = "KV transfer failed:" if load.failed else "KV transfer"
    return f"{word}{size} in {load.wait_ms:,.0f} ms{alone}{of_ttft}"
