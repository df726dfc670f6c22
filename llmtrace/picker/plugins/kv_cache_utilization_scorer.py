"""kv-cache-utilization-scorer: prefers endpoints with more free KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Parameters, Scorer
from llmtrace.picker.request import InferenceRequest


@REGISTRY.register
class KvCacheUtilizationScorer(Scorer[Parameters]):
    """Score: the free share of the KV cache."""

    type: ClassVar[str] = "kv-cache-utilization-scorer"

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """Score by KV cache usage."""
        return [1 - endpoint.load.kv_cache_usage for endpoint in endpoints]
