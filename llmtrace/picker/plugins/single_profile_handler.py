"""single-profile-handler: runs the one scheduling profile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from llmtrace.errors import UserError
from llmtrace.picker.plugin import REGISTRY, Others, Parameters, ProfileHandler, ProfileResult, SchedulingResult
from llmtrace.picker.request import InferenceRequest, no_result
from llmtrace.spans import Span


@REGISTRY.register
class SingleProfileHandler(ProfileHandler[Parameters]):
    """The result is that of the only profile."""

    type: ClassVar[str] = "single-profile-handler"

    def connect(self, others: Others) -> None:
        """There must be one profile."""
        if len(others.profiles) != 1:
            raise UserError(f"{self.type} takes one scheduling profile; there are {len(others.profiles)}")

    def pick(
        self,
        request: InferenceRequest,
        profiles: Collection[str],
        results: Mapping[str, ProfileResult | None],
        parent: Span,
    ) -> Collection[str]:
        """The profile first, then none."""
        return () if results else profiles

    def process(self, request: InferenceRequest, results: Mapping[str, ProfileResult | None]) -> SchedulingResult:
        """The only profile's result."""
        ((name, result),) = results.items()
        if result is None:
            raise no_result(f"failed to run scheduler profile '{name}'")
        return SchedulingResult({name: result}, name)
