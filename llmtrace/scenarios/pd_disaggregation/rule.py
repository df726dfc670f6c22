"""The rule by which llm-d decides between one server and two, and the answers that it may give.

Source: llm-d-router, profilehandler/disagg: prefix_based_pd_decider.go, always_disagg_pd_decider.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from llmtrace.scenarios.facts import integer, text
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Attributes

ALWAYS_DECIDER = "always-disagg-pd-decider"
PREFIX_DECIDER = "prefix-based-pd-decider"
PROFILE_HANDLER = "disagg-profile-handler"

ESTIMATE_SHARE = 0.15
"""The picker counts a token for four bytes of text, and the model's tokenizer counts its own: 4 % apart for the
tenants' English with SmolLM2, and by up to this share they may differ here."""
PICKER_BLOCK_TOKENS = 64
"""The picker takes prompts as cached in whole blocks; llm-d's are of 64 tokens or more. Also covers the chat template's
tokens, which the picker does not see."""


class Reason(StrEnum):
    """Why a request is split or not: the values of ``llmtrace.pd.reason``."""

    ABOVE_THRESHOLD = "uncached_at_or_above_threshold"
    BELOW_THRESHOLD = "uncached_below_threshold"
    PROMPT_BELOW_MINIMUM = "prompt_below_minimum"
    SPLITTING_DISABLED = "splitting_disabled"
    ALWAYS = "always"
    NO_PREFILL_ENDPOINT = "no_prefill_endpoint"
    NO_PREFIX_DATA = "no_prefix_data"
    NO_DECIDER = "no_decider"


SPLITTING = (Reason.ABOVE_THRESHOLD, Reason.ALWAYS)


@dataclass(frozen=True)
class Decider:
    """A decider as it is configured. Tokens; a threshold of 0 never splits."""

    type: str
    threshold_tokens: int = 0
    minimum_prompt_tokens: int = 0

    @property
    def attributes(self) -> Attributes:
        """The decider as attributes of a span."""
        told: Attributes = {a.PD_DECIDER: self.type}
        if self.type != PREFIX_DECIDER:
            return told
        return {
            **told,
            a.PD_THRESHOLD_TOKENS: self.threshold_tokens,
            a.PD_MINIMUM_PROMPT_TOKENS: self.minimum_prompt_tokens,
        }


def decider_of(attributes: Attributes) -> Decider | None:
    """The decider that a span's attributes tell, None where they tell none."""
    kind = text(attributes.get(a.PD_DECIDER))
    if not kind:
        return None
    threshold = integer(attributes.get(a.PD_THRESHOLD_TOKENS))
    if kind == PREFIX_DECIDER and threshold is None:
        return None
    return Decider(kind, threshold or 0, integer(attributes.get(a.PD_MINIMUM_PROMPT_TOKENS)) or 0)


def configured(stack: Stack) -> Mapping[str, Attributes]:
    """The decider of each picker of the stack, as attributes, from its EndpointPickerConfig file.

    A picker whose file does not tell is left out.
    """
    found = {arm: decider_at(picker.config) for arm, picker in stack.pickers.items()}
    return {arm: decider.attributes for arm, decider in found.items() if decider is not None}


def decider_at(path: Path) -> Decider | None:
    """The decider of an EndpointPickerConfig file, None where it does not tell."""
    try:
        return read_decider(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, UnicodeError, yaml.YAMLError):
        return None


def read_decider(config: object) -> Decider | None:
    """The decider of an EndpointPickerConfig, None where it has none or is no such thing."""
    listed = _mapping(config).get("plugins")
    plugins = [_mapping(p) for p in listed] if isinstance(listed, list) else []
    named = {str(p.get("name") or p.get("type")): p for p in plugins}
    handler = next((p for p in plugins if p.get("type") == PROFILE_HANDLER), {})
    wanted = _mapping(_mapping(handler.get("parameters")).get("deciders")).get("prefill")
    decider = named.get(str(wanted))
    if decider is None:
        return None
    parameters = _mapping(decider.get("parameters"))
    threshold, minimum = integer(parameters.get("nonCachedTokens")), integer(parameters.get("promptTokens"))
    return Decider(str(decider.get("type")), threshold or 0, minimum or 0)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def reason(decider: Decider, prompt_tokens: int, cached_tokens: int | None) -> Reason:
    """The rule itself; ``cached_tokens`` are those on the decode server, None where nothing is known of them."""
    if decider.type == ALWAYS_DECIDER:
        return Reason.ALWAYS
    if decider.threshold_tokens == 0:
        return Reason.SPLITTING_DISABLED
    if prompt_tokens < decider.minimum_prompt_tokens:
        return Reason.PROMPT_BELOW_MINIMUM
    if prompt_tokens - (cached_tokens or 0) < decider.threshold_tokens:
        return Reason.BELOW_THRESHOLD
    return Reason.NO_PREFIX_DATA if cached_tokens is None else Reason.ABOVE_THRESHOLD


def possible_reasons(decider: Decider, prompt_tokens: int, cached_tokens: int, kv_block_size: int) -> frozenset[Reason]:
    """What the rule may say where prompt and cache are the model server's own numbers.

    The picker's differ from them: it estimates tokens (by :data:`ESTIMATE_SHARE`), and it and the server count what is
    cached in whole blocks, each in its own. Near the threshold both answers are right.
    """
    uncached = prompt_tokens - cached_tokens
    prompt_slack = tolerance_tokens(prompt_tokens, kv_block_size)
    slack = tolerance_tokens(uncached, kv_block_size)
    return frozenset(
        reason(decider, prompt, prompt - min(max(left, 0), prompt))
        for prompt in (max(prompt_tokens - prompt_slack, 0), prompt_tokens + prompt_slack)
        for left in (uncached - slack, uncached + slack)
    )


def tolerance_tokens(tokens: int, kv_block_size: int) -> int:
    """How far the picker's count of these tokens may be from the server's; see :func:`possible_reasons`."""
    return int(tokens * ESTIMATE_SHARE) + PICKER_BLOCK_TOKENS + kv_block_size
