"""Splitting a request into a prefill and a decode server: what a decider says, and why.

The values are those of the attributes ``llmtrace.pd.decision`` and ``llmtrace.pd.reason``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import ParametersT, Plugin
from llmtrace.picker.request import InferenceRequest


class Decision(StrEnum):
    """How a request is served."""

    SPLIT = "split"
    UNIFIED = "unified"


class Reason(StrEnum):
    """Why a request is split or not."""

    UNCACHED_AT_OR_ABOVE_THRESHOLD = "uncached_at_or_above_threshold"
    UNCACHED_BELOW_THRESHOLD = "uncached_below_threshold"
    PROMPT_BELOW_MINIMUM = "prompt_below_minimum"
    SPLITTING_DISABLED = "splitting_disabled"
    ALWAYS = "always"
    NO_PREFILL_ENDPOINT = "no_prefill_endpoint"
    NO_PREFIX_DATA = "no_prefix_data"
    NO_DECIDER = "no_decider"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request should be split, why, and the tokens that the decider looked at; None for those it did not."""

    split: bool
    reason: Reason
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    threshold_tokens: int | None = None
    minimum_prompt_tokens: int | None = None


class PrefillDecider(Plugin[ParametersT]):
    """Decides whether the prefill of a request runs on a server of its own."""

    def decide(self, request: InferenceRequest, endpoint: Endpoint) -> Verdict:
        """The verdict about a request whose decode server is to be ``endpoint``."""
        raise NotImplementedError
