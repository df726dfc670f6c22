"""The names that the code uses: what of the registry has an annotation ``constant``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmtrace.errors import UserError
from llmtrace.semconv.format import (
    AttributeEntry,
    AttributeNotes,
    Enumeration,
    Group,
    GroupNotes,
    MemberNotes,
    SignalNotes,
    SpanNotes,
    fault,
    notes,
)


@dataclass(frozen=True)
class Constant:
    """A name of the code, and what it stands for: a header, a service, a span, an attribute, one of its values."""

    name: str
    value: str
    brief: str
    file: str


def constants(groups: Iterable[tuple[str, Group]]) -> tuple[Constant, ...]:
    """All of them, file by file: the service, then in the groups' order attributes, signals, others.

    Raises UserError where two have the same name.
    """
    found: dict[str, Constant] = {}
    for file, group in groups:
        for constant in _of_group(file, group):
            if constant.name in found:
                other = found[constant.name].file
                raise UserError(f"{file}: the constant {constant.name} is already in {other}; give another name")
            found[constant.name] = constant
    return tuple(found.values())


def _of_group(file: str, group: Group) -> Iterator[Constant]:
    own = notes(GroupNotes, group.annotations, file, group.id) if group.type == "attribute_group" else GroupNotes()
    if own.emitter and own.emitter.constant:
        yield Constant(own.emitter.constant, own.emitter.service, own.emitter.brief, file)
    for entry in group.attributes:
        yield from _of_attribute(file, group, entry)
    if group.type in ("span", "event", "metric"):
        name, value = _of_signal(file, group)
        if name:
            yield Constant(name, value, group.brief, file)
    yield from (Constant(c.name, c.value, c.brief, file) for c in own.constants)


def _of_attribute(file: str, group: Group, entry: AttributeEntry) -> Iterator[Constant]:
    if entry.id is None:
        return
    if name := notes(AttributeNotes, entry.annotations, file, group.id).constant:
        yield Constant(name, entry.id, str(entry.brief), file)
    for member in entry.type.members if isinstance(entry.type, Enumeration) else ():
        if name := notes(MemberNotes, member.annotations, file, group.id).constant:
            if not isinstance(member.value, str):
                raise fault(file, group.id, f"the value {member.value} of {entry.id} is no text to have a constant")
            yield Constant(name, member.value, member.brief or f"A value of {entry.id}", file)


def _of_signal(file: str, group: Group) -> tuple[str | None, str]:
    """The constant of a span, an event or a metric, and its value."""
    if group.type == "span":
        span = notes(SpanNotes, group.annotations, file, group.id)
        # A name that ends in a star is a prefix to the code.
        return span.constant, span.name.removesuffix("*")
    return notes(SignalNotes, group.annotations, file, group.id).constant, str(group.name or group.metric_name)
