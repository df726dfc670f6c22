"""precise-prefix-cache-scorer: precise-prefix-cache-producer and prefix-cache-scorer in one, which llm-d deprecates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.errors import UserError
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Handle, Others, Scorer
from llmtrace.picker.plugins.precise_prefix_cache_producer import (
    PrecisePrefixCacheParameters,
    PrecisePrefixCacheProducer,
)
from llmtrace.picker.plugins.prefix_cache_scorer import PrefixCacheScorer, PrefixCacheScorerParameters
from llmtrace.picker.request import InferenceRequest
from llmtrace.spans import Attributes


@REGISTRY.register
class PrecisePrefixCacheScorer(Scorer[PrecisePrefixCacheParameters]):
    """Reads from the only precise-prefix-cache-producer; where there is none, makes one of its own parameters."""

    type: ClassVar[str] = "precise-prefix-cache-scorer"
    deprecated_for: ClassVar[str] = f"{PrecisePrefixCacheProducer.type} and {PrefixCacheScorer.type}"
    parameters_type = PrecisePrefixCacheParameters

    def __init__(self, name: str, parameters: PrecisePrefixCacheParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        self._scorer = self._reading(PrecisePrefixCacheProducer.type)

    def connect(self, others: Others) -> None:
        """Find the producer, or make it."""
        producers = others.of(PrecisePrefixCacheProducer)
        if not producers:
            others.add(PrecisePrefixCacheProducer(PrecisePrefixCacheProducer.type, self.parameters, self.handle))
        elif len(producers) == 1:
            self._scorer = self._reading(producers[0].name)
        else:
            names = " and ".join(repr(producer.name) for producer in producers)
            raise UserError(
                f"plugin {self.name!r}: there are the producers {names}: use a {PrefixCacheScorer.type} "
                "whose prefixMatchInfoProducerName is one of them"
            )

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """The share of the prompt's blocks."""
        return self._scorer.score(request, endpoints)

    def span_attributes(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Attributes:
        """The evidence."""
        return self._scorer.span_attributes(request, endpoints)

    def _reading(self, producer: str) -> PrefixCacheScorer:
        parameters = PrefixCacheScorerParameters.model_validate({"prefixMatchInfoProducerName": producer})
        return PrefixCacheScorer(self.name, parameters, self.handle)
