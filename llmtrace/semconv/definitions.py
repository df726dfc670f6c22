"""The registry of names as typed objects: spans, attributes, events, metrics, and how they hang together.

The files under ``registry/`` are OpenTelemetry Weaver's semantic conventions (open-telemetry/weaver,
schemas/semconv-syntax.md). What that format has no field for stands in its free ``annotations``, under ``llmtrace``;
see the models of :mod:`llmtrace.semconv.format`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path

from llmtrace.semconv.constants import Constant, constants
from llmtrace.semconv.format import (
    AttributeEntry,
    AttributeNotes,
    EmitterNotes,
    Example,
    Group,
    GroupNotes,
    ScenarioNotes,
    SignalNotes,
    SpanNotes,
    fault,
    notes,
    read,
)

REGISTRY = Path(__file__).with_name("registry")


@dataclass(frozen=True)
class AttributeDefinition:
    """An attribute, as declared or as one span, event or metric uses it.

    ``type`` is one of Weaver's; an enumeration has type ``string`` (or ``int``) and its ``members``. ``level`` is the
    requirement level where it is used, with ``condition`` in words; ``unless_error`` makes it required wherever the
    span did not end with an error.
    """

    id: str
    type: str
    brief: str
    stability: str
    file: str
    members: tuple[str | int, ...] = ()
    examples: tuple[Example, ...] = ()
    unit: str = ""
    level: str = "recommended"
    condition: str = ""
    unless_error: bool = False


@dataclass(frozen=True)
class Emitter:
    """Who sends the spans of one file: the ``component`` for people, and the ``service`` in its resource."""

    component: str
    service: str
    hint: str = ""


@dataclass(frozen=True)
class EventDefinition:
    """A span event."""

    id: str
    name: str
    brief: str
    attributes: Mapping[str, AttributeDefinition]


@dataclass(frozen=True)
class SpanDefinition:
    """A span. ``name`` is a shell-style pattern, ``kind`` as in :class:`llmtrace.traces.model.Span`.

    ``parents`` are ids of the spans under which it may hang; none makes it a root. With ``remote_parent`` it may also
    hang under a caller's span that nobody recorded, or have no parent. ``links`` are ids of the spans to which it may
    link. ``scenarios`` says for which scenarios a trace must have it, once or in several places.
    """

    id: str
    name: str
    kind: str
    brief: str
    origin: str
    emitter: Emitter
    file: str
    attributes: Mapping[str, AttributeDefinition] = field(default_factory=dict)
    events: tuple[EventDefinition, ...] = ()
    parents: tuple[str, ...] = ()
    remote_parent: bool = False
    links: tuple[str, ...] = ()
    scenarios: Mapping[str, Sequence[ScenarioNotes]] = field(default_factory=dict)

    @property
    def is_root(self) -> bool:
        """Whether it never has a parent."""
        return not self.parents and not self.remote_parent

    def matches(self, service: str, name: str) -> bool:
        """Whether a span of this service and name is one of these."""
        return service == self.emitter.service and fnmatchcase(name, self.name)


@dataclass(frozen=True)
class MetricDefinition:
    """A metric under its full name, with its attributes (Prometheus: labels)."""

    id: str
    name: str
    instrument: str
    unit: str
    brief: str
    origin: str
    attributes: Mapping[str, AttributeDefinition]


@dataclass(frozen=True)
class Registry:
    """Everything that is declared, in the order of files and groups."""

    attributes: Mapping[str, AttributeDefinition]
    spans: Mapping[str, SpanDefinition]
    events: Mapping[str, EventDefinition]
    metrics: Mapping[str, MetricDefinition]
    emitters: tuple[Emitter, ...]
    constants: tuple[Constant, ...]

    def span(self, service: str, name: str, kind: str = "") -> SpanDefinition | None:
        """The definition of a span; of several that match, the one of this kind."""
        found = self._matching.get((service, name))
        if found is None:
            found = [d for d in self.spans.values() if d.matches(service, name)]
            self._matching[service, name] = found
        return next((d for d in found if d.kind == kind), found[0] if found else None)

    @cached_property
    def _matching(self) -> dict[tuple[str, str], list[SpanDefinition]]:
        return {}

    def required(self, scenario: str) -> list[tuple[SpanDefinition, ScenarioNotes]]:
        """The spans that a trace of the scenario must have."""
        return [(d, told) for d in self.spans.values() for told in d.scenarios.get(scenario, ())]


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The kit's own registry."""
    return load(REGISTRY)


def load(folder: Path) -> Registry:
    """Read a registry from the YAML files of a folder; UserError names the file and the group at fault."""
    return _Loader(read(folder)).registry()


class _Loader:
    """Resolves the groups of all files against each other."""

    def __init__(self, groups: list[tuple[str, Group]]) -> None:
        self.groups = groups
        self.by_id: dict[str, tuple[str, Group]] = {}
        for file, group in groups:
            if group.id in self.by_id:
                raise fault(file, group.id, f"this id is already in {self.by_id[group.id][0]}")
            self.by_id[group.id] = file, group
        self.attributes = self._declared()
        self.emitters = self._emitters()
        self.events = {g.id: self._event(file, g) for file, g in self._typed("event")}

    def registry(self) -> Registry:
        spans = {g.id: self._span(file, g) for file, g in self._typed("span")}
        spans = {d.id: self._related(d, spans) for d in spans.values()}
        metrics = {g.id: self._metric(file, g) for file, g in self._typed("metric")}
        emitters = tuple(self.emitters.values())
        self._check()
        return Registry(self.attributes, spans, self.events, metrics, emitters, constants(self.groups))

    def _check(self) -> None:
        """What only Weaver would look at otherwise: groups that no signal uses, and names that are there twice."""
        named: dict[tuple[str, str], str] = {}
        for file, group in self.groups:
            self._attributes(file, group)
            name = group.metric_name if group.type == "metric" else group.name
            if group.type in ("metric", "event", "entity") and name:
                if (group.type, name) in named:
                    raise fault(file, group.id, f"the {group.type} {name} is already {named[group.type, name]}")
                named[group.type, name] = group.id

    def _typed(self, type_: str) -> Iterator[tuple[str, Group]]:
        return ((file, g) for file, g in self.groups if g.type == type_)

    def _declared(self) -> dict[str, AttributeDefinition]:
        declared: dict[str, AttributeDefinition] = {}
        for file, group in self.groups:
            for entry in group.attributes:
                if entry.id is None:
                    continue
                if entry.id in declared:
                    where = declared[entry.id].file
                    raise fault(file, group.id, f"attribute {entry.id} is already declared in {where}; refer to it")
                declared[entry.id] = self._definition(file, group, entry)
        return declared

    def _definition(self, file: str, group: Group, entry: AttributeEntry) -> AttributeDefinition:
        type_, members = entry.value_type()
        own = notes(AttributeNotes, entry.annotations, file, group.id)
        base = AttributeDefinition(
            id=str(entry.id),
            type=type_,
            brief=entry.brief or "",
            stability=entry.stability or "",
            file=file,
            members=members,
            examples=entry.example_values(),
            unit=own.unit,
        )
        return self._required(base, entry, own)

    @staticmethod
    def _required(base: AttributeDefinition, entry: AttributeEntry, own: AttributeNotes) -> AttributeDefinition:
        level, condition = entry.requirement()
        return replace(base, level=level, condition=condition, unless_error=own.unless_error)

    def _attributes(self, file: str, group: Group, seen: tuple[str, ...] = ()) -> dict[str, AttributeDefinition]:
        """The attributes of a group, those of the groups that it extends included."""
        found: dict[str, AttributeDefinition] = {}
        if group.extends:
            if group.extends not in self.by_id or group.extends in (*seen, group.id):
                raise fault(file, group.id, f"it extends {group.extends}, which is no other group")
            found |= self._attributes(*self.by_id[group.extends], (*seen, group.id))
        for entry in group.attributes:
            name = entry.ref or str(entry.id)
            base = self.attributes.get(name)
            if base is None:
                raise fault(file, group.id, f"it refers to the attribute {name}, which nothing declares")
            if entry.ref:
                own = notes(AttributeNotes, entry.annotations, file, group.id)
                if entry.brief:
                    base = replace(base, brief=entry.brief)
                base = self._required(base, entry, own)
            found[name] = base
        return found

    def _emitters(self) -> dict[str, Emitter]:
        emitters: dict[str, Emitter] = {}
        for file, group in self._typed("attribute_group"):
            told: EmitterNotes | None = notes(GroupNotes, group.annotations, file, group.id).emitter
            if told is None:
                continue
            if file in emitters:
                raise fault(file, group.id, "the file has an emitter already")
            emitters[file] = Emitter(told.component, told.service, told.hint)
        return emitters

    def _event(self, file: str, group: Group) -> EventDefinition:
        return EventDefinition(group.id, str(group.name), group.brief, self._attributes(file, group))

    def _span(self, file: str, group: Group) -> SpanDefinition:
        own = notes(SpanNotes, group.annotations, file, group.id)
        if file not in self.emitters:
            raise fault(file, group.id, "no group of the file says in annotations.llmtrace.emitter who sends the span")
        if unknown := [e for e in group.events if e not in self.events]:
            raise fault(file, group.id, f"it refers to the event {unknown[0]}, which nothing declares")
        return SpanDefinition(
            id=group.id,
            name=own.name,
            kind=str(group.span_kind).upper(),
            brief=group.brief,
            origin=own.origin,
            emitter=self.emitters[file],
            file=file,
            attributes=self._attributes(file, group),
            events=tuple(self.events[e] for e in group.events),
            parents=tuple(own.parents),
            remote_parent=own.remote_parent,
            links=tuple(own.links),
            scenarios=own.scenarios,
        )

    def _related(self, span: SpanDefinition, spans: Mapping[str, SpanDefinition]) -> SpanDefinition:
        """The span with the patterns of its relations replaced by ids, and its scenarios checked."""

        def resolved(patterns: Iterable[str]) -> tuple[str, ...]:
            ids: dict[str, None] = {}
            for pattern in patterns:
                found = [i for i in spans if fnmatchcase(i, pattern)]
                if not found:
                    raise fault(span.file, span.id, f"it refers to the span {pattern}, which nothing declares")
                ids |= dict.fromkeys(found)
            return tuple(ids)

        for scenario, told in ((name, one) for name, listed in span.scenarios.items() for one in listed):
            keys = {one.key: d for d in spans.values() for one in d.scenarios.get(scenario, ())}
            if unknown := [a for a in told.attributes if a not in span.attributes]:
                raise fault(span.file, span.id, f"{scenario} requires {unknown[0]}, which the span does not have")
            if unknown := [key for key in told.under if key not in keys]:
                raise fault(span.file, span.id, f"{scenario} has it under {unknown[0]}, which nothing declares")
            if told.count is not None:
                counted = keys.get(told.count.span)
                if counted is None or told.count.attribute not in counted.attributes:
                    where = f"{told.count.attribute} of {told.count.span}"
                    raise fault(span.file, span.id, f"{scenario} counts by {where}, which nothing declares")
        return replace(span, parents=resolved(span.parents), links=resolved(span.links))

    def _metric(self, file: str, group: Group) -> MetricDefinition:
        return MetricDefinition(
            group.id,
            str(group.metric_name),
            str(group.instrument),
            str(group.unit),
            group.brief,
            notes(SignalNotes, group.annotations, file, group.id).origin,
            self._attributes(file, group),
        )
