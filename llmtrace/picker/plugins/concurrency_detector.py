"""concurrency-detector: how saturated endpoints are, by the requests that the picker sent them and that go on.

It needs no scrape, so that a queue does not run empty into one server between two of them.

Source: llm-d-router, pkg/epp/framework/plugins/flowcontrol/saturationdetector/concurrency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters, SaturationDetector
from llmtrace.picker.request import InferenceRequest


class ConcurrencyParameters(Parameters):
    """Requests in flight at which an endpoint is saturated; ``headroom`` is by which share the filter lets one exceed
    them. Of llm-d's modes there is the counting of requests, its default."""

    max_concurrency: int = Field(default=100, gt=0)
    headroom: float = Field(default=0.0, ge=0)
    concurrency_mode: Literal["requests"] = "requests"


@REGISTRY.register
class ConcurrencyDetector(SaturationDetector[ConcurrencyParameters], Filter[ConcurrencyParameters]):
    """The pool's saturation is its requests in flight over those that it may have; a pool without endpoints has 1."""

    type: ClassVar[str] = "concurrency-detector"
    parameters_type = ConcurrencyParameters

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        """Requests in flight over capacity, of all endpoints together."""
        if not endpoints:
            return 1.0
        return sum(e.in_flight for e in endpoints) / (len(endpoints) * self.parameters.max_concurrency)

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Those that are within their limit, maybe none."""
        limit = int(self.parameters.max_concurrency * (1 + self.parameters.headroom))
        return [e for e in endpoints if e.in_flight < limit]
