"""always-disagg-pd-decider: splits every request."""

from __future__ import annotations

from typing import ClassVar

from llmtrace.picker.disaggregation import PrefillDecider, Reason, Verdict
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Parameters
from llmtrace.picker.request import InferenceRequest


@REGISTRY.register
class AlwaysDisaggPdDecider(PrefillDecider[Parameters]):
    """Splits, and looks at nothing."""

    type: ClassVar[str] = "always-disagg-pd-decider"

    def decide(self, request: InferenceRequest, endpoint: Endpoint) -> Verdict:
        """Split."""
        return Verdict(True, Reason.ALWAYS)
