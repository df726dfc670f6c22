"""prefix-based-pd-decider: splits requests of which the decode server would have much to prefill.

Source: llm-d-router, profilehandler/disagg/prefix_based_pd_decider.go.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmtrace.picker.disaggregation import PrefillDecider, Reason, Verdict
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Others
from llmtrace.picker.prefix_match import PrefixMatchParameters, prefix_match
from llmtrace.picker.request import InferenceRequest


class PrefixBasedPdDeciderParameters(PrefixMatchParameters):
    """llm-d's parameters, in tokens. ``prefix_match_info_producer_name`` is newer than llm-d's release 0.10.

    ``non_cached_tokens``: uncached tokens from which a request is split; 0 splits none. ``prompt_tokens``: shorter
    prompts are never split.
    """

    non_cached_tokens: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(default=0, ge=0)


@REGISTRY.register
class PrefixBasedPdDecider(PrefillDecider[PrefixBasedPdDeciderParameters]):
    """Splits where the prompt less what the decode server has cached reaches the threshold."""

    type: ClassVar[str] = "prefix-based-pd-decider"
    parameters_type = PrefixBasedPdDeciderParameters

    def connect(self, others: Others) -> None:
        """There must be a producer to read from."""
        others.producer(self.parameters.producer, f"plugin {self.name!r}: prefixMatchInfoProducerName")

    def decide(self, request: InferenceRequest, endpoint: Endpoint) -> Verdict:
        """Decide by prompt, cache and thresholds. Without cache data only a prompt below the threshold is certain."""
        threshold, minimum = self.parameters.non_cached_tokens, self.parameters.prompt_tokens
        if threshold == 0:
            return Verdict(False, Reason.SPLITTING_DISABLED, threshold_tokens=threshold)
        prompt = request.prompt_tokens
        if prompt < minimum:
            return Verdict(False, Reason.PROMPT_BELOW_MINIMUM, prompt, None, threshold, minimum)
        match = prefix_match(request, self.parameters.producer)
        cached = None if match is None else match.tokens(endpoint.id)
        if prompt - (cached or 0) < threshold:
            reason = Reason.UNCACHED_BELOW_THRESHOLD
        elif cached is None:
            reason = Reason.NO_PREFIX_DATA
        else:
            reason = Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD
        return Verdict(reason is Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, reason, prompt, cached, threshold, minimum)
