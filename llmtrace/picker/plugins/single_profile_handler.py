"""single-profile-handler: runs the one scheduling profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from llmtrace.picker.plugin import REGISTRY, Parameters, ProfileHandler, ProfileResult, SchedulingResult
from llmtrace.picker.request import InferenceRequest, no_result


@REGISTRY.register
class SingleProfileHandler(ProfileHandler[Parameters]):
    """The result is that of the only profile."""

    type: ClassVar[str] = "single-profile-handler"

    def pick(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, ProfileResult | None]
    ) -> list[str]:
        """All profiles first, then none."""
        return [] if results else list(profiles)

    def process(self, request: InferenceRequest, results: Mapping[str, ProfileResult | None]) -> SchedulingResult:
        """The only profile's result."""
        ((name, result),) = results.items()
        if result is None:
            raise no_result(f"failed to run scheduler profile '{name}'")
        return SchedulingResult({name: result}, name)
