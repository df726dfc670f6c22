"""queue-scorer: prefers endpoints with fewer waiting requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Parameters, Scorer
from llmtrace.picker.request import InferenceRequest


@REGISTRY.register
class QueueScorer(Scorer[Parameters]):
    """Score: 1 for the shortest queue, 0 for the longest, linear between; 1 for all where they are equal."""

    type: ClassVar[str] = "queue-scorer"

    def score(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[float]:
        """Score by the number of waiting requests."""
        queues = [endpoint.load.waiting for endpoint in endpoints]
        longest = max(queues)
        spread = longest - min(queues)
        return [(longest - queue) / spread for queue in queues] if spread else [1.0] * len(queues)
