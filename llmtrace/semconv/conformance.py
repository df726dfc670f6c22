"""Traces against the registry: what they hold that is not declared, and what is declared and not so in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from llmtrace.semconv.definitions import AttributeDefinition, EventDefinition, Registry, SpanDefinition, registry
from llmtrace.semconv.format import SCALARS, has_type
from llmtrace.traces.model import Attributes, AttributeValue, Span, Trace

MOST_SHOWN = 40
"""Characters of a value that a finding quotes."""


class Fault(StrEnum):
    """In what a span can differ from its declaration."""

    SPAN = "undeclared span"
    KIND = "wrong kind"
    ATTRIBUTE = "undeclared attribute"
    EVENT = "undeclared event"
    TYPE = "wrong type"
    VALUE = "wrong value"
    MISSING = "missing attribute"
    PARENT = "broken relation"
    LINK = "broken link"


class Finding(BaseModel):
    """One difference, how often it occurs, and one trace that has it."""

    model_config = ConfigDict(frozen=True)
    fault: Fault
    service: str
    span: str
    detail: str
    count: int
    trace_id: str


class Report(BaseModel):
    """The outcome of a check: ``findings`` in the order of the faults, the most frequent first."""

    model_config = ConfigDict(frozen=True)
    traces: int
    spans: int
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether everything is as declared."""
        return not self.findings


class _Difference(NamedTuple):
    fault: Fault
    service: str
    span: str
    detail: str


def check(traces: Iterable[Trace], declared: Registry | None = None) -> Report:
    """Compare every span of the traces with the registry; None is the kit's own."""
    names = declared or registry()
    found: dict[_Difference, tuple[int, str]] = {}
    checked = spans = 0
    for trace in traces:
        checked += 1
        spans += len(trace.spans)
        for span in trace.spans:
            for difference in _differences(span, trace, names):
                count, example = found.get(difference, (0, trace.trace_id))
                found[difference] = count + 1, example
    order = list(Fault)
    findings = [
        Finding(**difference._asdict(), count=count, trace_id=trace_id)
        for difference, (count, trace_id) in sorted(
            found.items(), key=lambda item: (order.index(item[0].fault), -item[1][0], item[0])
        )
    ]
    return Report(traces=checked, spans=spans, findings=findings)


def _differences(span: Span, trace: Trace, declared: Registry) -> Iterator[_Difference]:
    definition = declared.span(span.service, span.name, span.kind)
    if definition is None:
        yield _Difference(Fault.SPAN, span.service or "unknown", span.name, f"{span.name!r} is not declared")
        return

    def of(fault: Fault, detail: str) -> _Difference:
        return _Difference(fault, span.service, definition.name, detail)

    if span.kind != definition.kind:
        yield of(Fault.KIND, f"{span.kind} where {definition.kind} is declared")
    for fault, detail in _attributes(span.attributes, definition.attributes.values(), failed=span.status == "ERROR"):
        yield of(fault, detail)
    yield from (of(fault, detail) for fault, detail in _events(span, definition.events))
    if broken := _relation(span, definition, trace, declared):
        yield of(Fault.PARENT, broken)
    yield from (of(Fault.LINK, detail) for detail in _links(span, definition, trace, declared))


def _attributes(
    attributes: Attributes, definitions: Iterable[AttributeDefinition], *, failed: bool, where: str = ""
) -> Iterator[tuple[Fault, str]]:
    known = {definition.id: definition for definition in definitions}
    for name, value in attributes.items():
        definition = known.get(name)
        if definition is None:
            yield Fault.ATTRIBUTE, f"{where}{name}"
        elif not has_type(value, definition.type):
            yield Fault.TYPE, f"{where}{name}: {_type_of(value)} where {definition.type} is declared"
        elif definition.members and value not in definition.members:
            allowed = " or ".join(map(str, definition.members))
            yield Fault.VALUE, f"{where}{name}: {_shown(value)} where {allowed} is declared"
    for name, definition in known.items():
        needed = definition.level == "required" or (definition.unless_error and not failed)
        if needed and attributes.get(name) is None:
            yield Fault.MISSING, f"{where}{name}"


def _events(span: Span, definitions: Sequence[EventDefinition]) -> Iterator[tuple[Fault, str]]:
    known = {definition.name: definition for definition in definitions}
    for event in span.events:
        definition = known.get(event.name)
        if definition is None:
            yield Fault.EVENT, event.name
        else:
            where = f"event {event.name}: "
            yield from _attributes(event.attributes, definition.attributes.values(), failed=False, where=where)


def _relation(span: Span, definition: SpanDefinition, trace: Trace, declared: Registry) -> str:
    """What is wrong with the span's place in the trace; empty when nothing is."""
    if span.parent_id is None:
        return "" if definition.is_root or definition.remote_parent else "it has no parent"
    if definition.is_root:
        return "it has a parent and must be a root"
    parent = trace.parent(span)
    if parent is None:
        return "" if definition.remote_parent else "its parent is not in the trace"
    above = declared.span(parent.service, parent.name, parent.kind)
    if above is None:
        # Spans of others are named once, as undeclared; below them is where a caller's parent would be.
        return "" if definition.remote_parent else f"it hangs under {parent.name!r}, which is not declared"
    if above.id in definition.parents:
        return ""
    wanted = " or ".join(declared.spans[p].name for p in definition.parents)
    return f"it hangs under {above.name!r} of {parent.service}, not under {wanted}"


def _links(span: Span, definition: SpanDefinition, trace: Trace, declared: Registry) -> Iterator[str]:
    for link in span.links:
        if not definition.links:
            yield "it has a link and none is declared"
            continue
        target = trace.by_id.get(link.span_id) if link.trace_id == trace.trace_id else None
        linked = declared.span(target.service, target.name, target.kind) if target else None
        # Where a link leads in another trace cannot be seen from this one.
        if target is not None and (linked is None or linked.id not in definition.links):
            yield f"it links to {target.name!r}, not to {' or '.join(declared.spans[i].name for i in definition.links)}"


def _type_of(value: AttributeValue) -> str:
    """The name of a value's type as the registry would have it."""
    if isinstance(value, list | tuple):
        kinds = sorted({_type_of(v) for v in value})
        return f"{kinds[0]}[]" if len(kinds) == 1 else f"a list of {' and '.join(kinds) or 'nothing'}"
    return next((name for name in SCALARS if has_type(value, name)), type(value).__name__)


def _shown(value: AttributeValue) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
