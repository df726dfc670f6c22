"""by-label: keeps endpoints by the value of one label. llm-d deprecates it in favour of label-selector-filter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters
from llmtrace.picker.request import InferenceRequest

ROLE_LABEL = "llm-d.ai/role"
"""Label of a model server that says which stages of a request it serves."""


def with_label(
    endpoints: Sequence[Endpoint], label: str, values: Collection[str], *, unlabelled: bool
) -> list[Endpoint]:
    """The endpoints whose label has one of these values, and if ``unlabelled`` those without the label."""
    return [e for e in endpoints if e.labels.get(label, "") in values or (unlabelled and label not in e.labels)]


class ByLabelParameters(Parameters):
    """llm-d's parameters."""

    label: str = Field(min_length=1)
    valid_values: list[str] = Field(default_factory=list)
    allows_no_label: bool = False

    @model_validator(mode="after")
    def _keeps_something(self) -> ByLabelParameters:
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("validValues must not be empty where allowsNoLabel is off")
        return self


@REGISTRY.register
class ByLabelFilter(Filter[ByLabelParameters]):
    """Keeps endpoints by the value of a label."""

    type: ClassVar[str] = "by-label"
    deprecated_for: ClassVar[str] = "label-selector-filter"
    parameters_type = ByLabelParameters

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Keep what has a valid value."""
        wanted = self.parameters
        return with_label(endpoints, wanted.label, wanted.valid_values, unlabelled=wanted.allows_no_label)
