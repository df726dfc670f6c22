"""utilization-detector: how saturated endpoints are, by their queues and KV caches.

Source: llm-d-router, pkg/epp/framework/plugins/flowcontrol/saturationdetector/utilization.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from llmtrace.durations import Duration
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters, SaturationDetector
from llmtrace.picker.request import InferenceRequest

DEFAULT_STALENESS_S = 0.2


class UtilizationParameters(Parameters):
    """Waiting requests and share of KV cache at which an endpoint is saturated; how old its metrics may be, in seconds;
    ``headroom`` is by which share the filter lets an endpoint exceed both."""

    queue_depth_threshold: int = Field(default=5, gt=0)
    kv_cache_util_threshold: float = Field(default=0.8, gt=0, le=1)
    metrics_staleness_threshold: Duration = DEFAULT_STALENESS_S
    headroom: float = Field(default=0.0, ge=0)


@REGISTRY.register
class UtilizationDetector(SaturationDetector[UtilizationParameters], Filter[UtilizationParameters]):
    """An endpoint's saturation is that of its scarcest resource, the pool's is the mean; 1 is saturated.

    An endpoint whose metrics are old counts as saturated, and so does a pool without endpoints.
    """

    type: ClassVar[str] = "utilization-detector"
    parameters_type = UtilizationParameters

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        """The mean of the endpoints' saturations."""
        fresh = [e for e in endpoints if self._fresh(e)]
        self.stale = len(endpoints) - len(fresh)
        if not endpoints:
            return 1.0
        return (self.stale + sum(map(self._of, fresh))) / len(endpoints)

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Those that are within their limits; all of them where none is."""
        limits = self.parameters
        queue = limits.queue_depth_threshold * (1 + limits.headroom)
        cache = limits.kv_cache_util_threshold * (1 + limits.headroom)
        left = [e for e in endpoints if self._fresh(e) and e.load.waiting < queue and e.load.kv_cache_usage < cache]
        return left or list(endpoints)

    def _of(self, endpoint: Endpoint) -> float:
        queue = endpoint.load.waiting / self.parameters.queue_depth_threshold
        return max(queue, endpoint.load.kv_cache_usage / self.parameters.kv_cache_util_threshold)

    def _fresh(self, endpoint: Endpoint) -> bool:
        age = None if endpoint.answered_at is None else time.monotonic() - endpoint.answered_at
        return age is not None and age <= self.parameters.metrics_staleness_threshold
