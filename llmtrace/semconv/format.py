"""The file format of the registry: Weaver's groups, and the kit's annotations in them.

Source: open-telemetry/weaver, schemas/semconv-syntax.md (the ``groups`` format) and the checks of
crates/weaver_semconv/src/group.rs. What is read here Weaver 0.25 reads too; what the kit has no use for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmtrace.errors import UserError

MANIFEST = "manifest.yaml"
KEY = "llmtrace"
"""The key of the kit's annotations."""

Example = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]
Stability = Literal["stable", "development", "alpha", "beta", "release_candidate"]
SimpleType = Literal[
    "string", "int", "double", "boolean", "any", "string[]", "int[]", "double[]", "boolean[]"
]  # Weaver's template types have no use here.


SCALARS: dict[str, type[object]] = {"string": str, "int": int, "double": float, "boolean": bool}


def has_type(value: object, declared: str) -> bool:
    """Whether a value is of a type of the format, strictly: 1 is no double."""
    if declared == "any":
        return True
    if declared.endswith("[]"):
        return isinstance(value, list | tuple) and all(has_type(v, declared.removesuffix("[]")) for v in value)
    return type(value) is SCALARS[declared]


class Strict(BaseModel):
    """A part of a file; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Member(Strict):
    """One allowed value of an enumeration."""

    id: str
    value: str | int
    brief: str = ""
    note: str = ""
    stability: Stability
    annotations: dict[str, Any] = Field(default_factory=dict)


class Enumeration(Strict):
    """A type with allowed values."""

    members: list[Member] = Field(min_length=1)


class Requirement(Strict):
    """A requirement level with its condition in words; one of the fields."""

    conditionally_required: str | None = None
    recommended: str | None = None
    opt_in: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give one requirement level")
        return self


class Deprecated(Strict):
    """Why a name is deprecated."""

    reason: Literal["renamed", "obsoleted", "uncategorized"]
    renamed_to: str | None = None
    note: str = ""

    @model_validator(mode="after")
    def _renamed(self) -> Self:
        if self.reason == "renamed" and self.renamed_to is None:
            raise ValueError("say in renamed_to what the new name is")
        return self


class AttributeEntry(Strict):
    """An attribute of a group: its declaration (``id``) or a reference to it (``ref``)."""

    id: str | None = None
    ref: str | None = None
    type: SimpleType | Enumeration | None = None
    brief: str | None = None
    note: str = ""
    examples: Example | list[Example] | None = None
    stability: Stability | None = None
    deprecated: Deprecated | None = None
    requirement_level: Literal["required", "recommended", "opt_in"] | Requirement = "recommended"
    role: Literal["identifying", "descriptive"] | None = None
    sampling_relevant: bool = False
    annotations: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _declared_or_referred(self) -> Self:
        name = self.id or self.ref
        if (self.id is None) == (self.ref is None):
            raise ValueError("an attribute has either an id or a ref")
        if self.id is not None:
            if self.type is None or self.stability is None or not self.brief:
                raise ValueError(f"attribute {name} needs a type, a brief and a stability")
            if self.type in ("string", "string[]") and self.examples is None:
                raise ValueError(f"attribute {name} needs examples")
            if isinstance(self.type, str) and not all(has_type(e, self.type) for e in self.example_values()):
                raise ValueError(f"every example of attribute {name} must be of type {self.type}")
        elif self.type is not None or self.stability is not None:
            raise ValueError(f"the reference to {name} must not change its type or stability")
        return self

    def value_type(self) -> tuple[str, tuple[str | int, ...]]:
        """The type, and the allowed values of an enumeration."""
        if isinstance(self.type, Enumeration):
            values = tuple(member.value for member in self.type.members)
            return ("int" if all(isinstance(v, int) for v in values) else "string"), values
        return str(self.type), ()

    def example_values(self) -> tuple[Example, ...]:
        """The examples, each of the attribute's type."""
        if self.examples is None:
            return ()
        return tuple(self.examples) if isinstance(self.examples, list) else (self.examples,)

    def requirement(self) -> tuple[str, str]:
        """The requirement level and its condition."""
        if isinstance(self.requirement_level, str):
            return self.requirement_level, ""
        ((level, condition),) = self.requirement_level.model_dump(exclude_unset=True).items()
        return level, condition


class Group(Strict):
    """A group: attributes, a span, an event, a metric, or an entity."""

    id: str
    type: Literal["attribute_group", "span", "event", "metric", "entity"]
    brief: str = Field(min_length=1)
    note: str = ""
    stability: Stability | None = None
    deprecated: Deprecated | None = None
    display_name: str | None = None
    extends: str | None = None
    attributes: list[AttributeEntry] = Field(default_factory=list)
    span_kind: Literal["client", "server", "producer", "consumer", "internal"] | None = None
    events: list[str] = Field(default_factory=list)
    name: str | None = None
    metric_name: str | None = None
    instrument: Literal["counter", "gauge", "histogram", "updowncounter"] | None = None
    unit: str | None = None
    annotations: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {
            "span": ("stability", "span_kind"),
            "event": ("stability", "name"),
            "entity": ("stability", "name"),
            "metric": ("stability", "metric_name", "instrument", "unit"),
        }.get(self.type, ())
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"a group of type {self.type} needs {' and '.join(missing)}")
        if self.type not in ("metric", "event") and not self.attributes and self.extends is None:
            raise ValueError(f"a group of type {self.type} needs attributes, or a group that it extends")
        if self.type != "span" and (self.span_kind is not None or self.events):
            raise ValueError("only a span has a span_kind and events")
        names = [entry.id or entry.ref for entry in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attribute {next(n for n in names if names.count(n) > 1)} is there twice")
        return self


class Document(Strict):
    """A file."""

    groups: list[Group]


class ConstantNotes(Strict):
    """A constant of the code that is no telemetry, such as a header."""

    name: str
    value: str
    brief: str


class EmitterNotes(Strict):
    """Who sends the spans of the file; ``hint`` says what to look at when they do not come."""

    component: str
    service: str
    brief: str
    hint: str = ""
    constant: str | None = None


class GroupNotes(Strict):
    """Annotations of an attribute group."""

    emitter: EmitterNotes | None = None
    constants: list[ConstantNotes] = Field(default_factory=list)


class MemberNotes(Strict):
    """Annotations of an allowed value."""

    constant: str | None = None


class AttributeNotes(Strict):
    """Annotations of an attribute. ``unless_error``: required on every span that did not end with an error."""

    constant: str | None = None
    unit: str = ""
    unless_error: bool = False


class SignalNotes(Strict):
    """Annotations of an event or a metric; ``origin`` is the project that chose the name."""

    constant: str | None = None
    origin: str = "llmtrace"


class CountNotes(Strict):
    """How many spans there must be: what ``attribute`` of the span with the key ``span`` says."""

    span: str
    attribute: str


class ScenarioNotes(Strict):
    """What a scenario's smoke test asks of a span that it requires.

    ``key`` names it within the scenario; ``name`` is a pattern that replaces the span's own; ``attributes`` must be
    there; ``many`` allows several. ``under`` are keys that replace the span's own parents; a span may be required
    several times, each time under another. ``forms`` are the forms of a trace in which it must be there; none is all.
    """

    key: str
    name: str | None = None
    attributes: list[str] = Field(default_factory=list)
    many: bool = False
    may_end_late: bool = False
    count: CountNotes | None = None
    under: list[str] = Field(default_factory=list)
    forms: list[str] = Field(default_factory=list)


class SpanNotes(SignalNotes):
    """Annotations of a span; see :class:`llmtrace.semconv.definitions.SpanDefinition`."""

    name: str
    parents: list[str] = Field(default_factory=list)
    remote_parent: bool = False
    links: list[str] = Field(default_factory=list)
    scenarios: dict[str, list[ScenarioNotes]] = Field(default_factory=dict)

    @field_validator("scenarios", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: told if isinstance(told, list) else [told] for name, told in given.items()}


NotesT = TypeVar("NotesT", bound=Strict)


def read(folder: Path) -> list[tuple[str, Group]]:
    """The groups of all files of a folder with the names of their files, in the order of these names."""
    paths = [path for path in sorted(folder.glob("*.yaml")) if path.name != MANIFEST]
    if not paths:
        raise UserError(f"{folder} has no registry: there is no YAML file in it")
    return [(path.name, group) for path in paths for group in _groups(path)]


def notes(model: type[NotesT], annotations: Mapping[str, Any], file: str, group: str) -> NotesT:
    """The kit's annotations of a group or an attribute."""
    try:
        return model.model_validate(annotations.get(KEY, {}))
    except ValidationError as error:
        raise fault(file, group, f"annotations.{KEY}: {_said(error)}") from None


def fault(file: str, group: str, what: str) -> UserError:
    """The error for a group of a file."""
    return UserError(f"{file}: group {group}: {what}")


def _groups(path: Path) -> list[Group]:
    try:
        # The loader in C is ten times faster, and the command line loads the registry whenever it starts.
        data = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{path.name} is not readable as YAML: {' '.join(str(error).split())}") from None
    try:
        return Document.model_validate(data).groups
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        number = location[1] if len(location) > 1 and location[0] == "groups" else None
        named = data["groups"][number] if isinstance(number, int) else None
        name = named.get("id", f"number {number}") if isinstance(named, dict) else "-"
        raise fault(path.name, name, _said(error)) from None


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg'].removeprefix('Value error, ')}" if where else first["msg"]
