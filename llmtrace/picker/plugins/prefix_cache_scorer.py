"""prefix-cache-scorer: prefers endpoints that have more of the prompt in their KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Others, Scorer
from llmtrace.picker.prefix_match import PrefixMatchParameters, prefix_match
from llmtrace.picker.request import InferenceRequest
from llmtrace.semconv import attributes as a
from llmtrace.spans import Attributes


class PrefixCacheScorerParameters(PrefixMatchParameters):
    """llm-d's parameters: ``match_length_weight`` is the share of the absolute match length in the score."""

    match_length_weight: float = Field(default=0.0, ge=0, le=1)
    match_length_scale_tokens: int = 8192

    @model_validator(mode="after")
    def _scaled(self) -> PrefixCacheScorerParameters:
        if self.match_length_weight > 0 and self.match_length_scale_tokens <= 0:
            raise ValueError("matchLengthScaleTokens must be more than 0 where matchLengthWeight is")
        return self


@REGISTRY.register
class PrefixCacheScorer(Scorer[PrefixCacheScorerParameters]):
    """Score: share of the prompt's blocks that the endpoint holds; 0 where nothing is known."""

    type: ClassVar[str] = "prefix-cache-scorer"
    parameters_type = PrefixCacheScorerParameters

    def connect(self, others: Others) -> None:
        """There must be a producer to read from."""
        others.producer(self.parameters.producer, f"plugin {self.name!r}: prefixMatchInfoProducerName")

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """Score by the share, and if weighted so by the square of the scaled match length."""
        match = prefix_match(request, self.parameters.producer)
        if match is None or match.total_blocks == 0:
            return [0.0] * len(endpoints)
        weight, scale = self.parameters.match_length_weight, self.parameters.match_length_scale_tokens
        scores = []
        for endpoint in endpoints:
            blocks = match.blocks.get(endpoint.id, 0)
            score = (1 - weight) * blocks / match.total_blocks
            if weight > 0:
                score += weight * min(1.0, blocks * match.block_size_tokens / scale) ** 2
            scores.append(score)
        return scores

    def span_attributes(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Attributes:
        """The evidence: prompt tokens in all, and those that each endpoint should have cached."""
        match = prefix_match(request, self.parameters.producer)
        if match is None:
            return {}
        return {
            a.MATCH_TOKENS: tuple(match.tokens(endpoint.id) for endpoint in endpoints),
            a.ESTIMATED_PROMPT_TOKENS: match.prompt_tokens,
        }
