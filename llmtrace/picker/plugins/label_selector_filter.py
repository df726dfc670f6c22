"""label-selector-filter: keeps the endpoints that a Kubernetes label selector matches.

Source: llm-d-router, filter/bylabel/selector.go; the selector is Kubernetes' LabelSelector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters
from llmtrace.picker.request import InferenceRequest

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_MAX_PREFIX = 253


def _key(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and not (_PREFIX.fullmatch(prefix) and len(prefix) <= _MAX_PREFIX)):
        raise ValueError("this is no name of a Kubernetes label")
    return value


def _value(value: str) -> str:
    if value and not _NAME.fullmatch(value):
        raise ValueError("this is no value of a Kubernetes label")
    return value


Key = Annotated[str, AfterValidator(_key)]
Value = Annotated[str, AfterValidator(_value)]


class Requirement(Parameters):
    """One of ``matchExpressions``."""

    key: Key
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[Value] = Field(default_factory=list)

    @model_validator(mode="after")
    def _valued(self) -> Requirement:
        if bool(self.values) != (self.operator in ("In", "NotIn")):
            raise ValueError("values must be given for the operators In and NotIn, and for no other")
        return self

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an endpoint with these labels fulfils it; NotIn also where it lacks the label."""
        if self.operator == "Exists":
            return self.key in labels
        if self.operator == "DoesNotExist":
            return self.key not in labels
        return (self.key in labels and labels[self.key] in self.values) == (self.operator == "In")


class LabelSelectorParameters(Parameters):
    """A LabelSelector. All of it must match; an empty one matches everything."""

    match_labels: dict[Key, Value] = Field(default_factory=dict)
    match_expressions: list[Requirement] = Field(default_factory=list)


@REGISTRY.register
class LabelSelectorFilter(Filter[LabelSelectorParameters]):
    """Keeps endpoints by their labels."""

    type: ClassVar[str] = "label-selector-filter"
    parameters_type = LabelSelectorParameters

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Keep what the selector matches."""
        wanted = self.parameters.match_labels.items()
        return [
            endpoint
            for endpoint in endpoints
            if wanted <= endpoint.labels.items()
            and all(requirement.matches(endpoint.labels) for requirement in self.parameters.match_expressions)
        ]


@REGISTRY.register
class ByLabelSelectorFilter(LabelSelectorFilter):
    """The same under its former name."""

    type: ClassVar[str] = "by-label-selector"
    deprecated_for: ClassVar[str] = LabelSelectorFilter.type
