"""load-aware-scorer: prefers endpoints whose queue is shorter, measured against a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Parameters, Scorer
from llmtrace.picker.request import InferenceRequest

DEFAULT_THRESHOLD = 128


class LoadAwareParameters(Parameters):
    """``threshold``: waiting requests at which the score reaches 0; not positive means the default."""

    threshold: int = DEFAULT_THRESHOLD


@REGISTRY.register
class LoadAwareScorer(Scorer[LoadAwareParameters]):
    """Score: 0.5 without waiting requests, falling to 0 at the threshold."""

    type: ClassVar[str] = "load-aware-scorer"
    parameters_type = LoadAwareParameters

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """Score by the number of waiting requests."""
        threshold = self.parameters.threshold if self.parameters.threshold > 0 else DEFAULT_THRESHOLD
        return [0.5 * (1 - min(endpoint.load.waiting, threshold) / threshold) for endpoint in endpoints]
