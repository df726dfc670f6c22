"""The reference for people: every declared name as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from llmtrace.semconv.definitions import AttributeDefinition, MetricDefinition, Registry, SpanDefinition

LEVELS = {
    "required": "required",
    "recommended": "",
    "opt_in": "on request",
    "conditionally_required": "if ",
}
INTRODUCTION = """\
# Reference: spans, attributes, metrics

Generated from [`llmtrace/semconv/registry`](../llmtrace/semconv/registry) by `make generate`; change it there.
[Names](semconv.md) says how they are chosen. `llmtrace conformance` checks live traces against this page.

In names of spans, `*` stands for any text."""


def reference(declared: Registry) -> str:
    """The page docs/reference.md."""
    parts: list[str] = [INTRODUCTION, "## Relations", _relations(declared)]
    parts.append("## Spans")
    for _, alike in groupby(declared.spans.values(), key=lambda span: (span.emitter, span.attributes)):
        parts += _spans(list(alike), declared)
    parts += ["## Events", _events(declared), "## Attributes", _attributes(declared.attributes.values())]
    parts += ["## Metrics", *_metrics(declared.metrics.values())]
    parts += ["## Other names", _others(declared)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"


def _parents(span: SpanDefinition, declared: Registry) -> str:
    names = [_code(declared.spans[parent].name) for parent in span.parents]
    if len(names) == len(_siblings(span, declared)) > 2:
        names = ["any span of the start-up"]
    if span.remote_parent:
        names.append("a caller's span, or none")
    return ", ".join(names) or "-"


def _siblings(span: SpanDefinition, declared: Registry) -> list[str]:
    """Ids of the spans of the same family as this one: those whose ids differ in the last part only."""
    family = span.id.rpartition(".")[0]
    return [other for other in declared.spans if other.rpartition(".")[0] == family]


def _relations(declared: Registry) -> str:
    rows = (
        (
            _code(span.name),
            _code(span.emitter.service),
            span.kind,
            _parents(span, declared),
            ", ".join(_code(declared.spans[link].name) for link in span.links) or "-",
            ", ".join(span.scenarios) or "-",
            span.origin,
        )
        for span in declared.spans.values()
    )
    return table(("span", "service", "kind", "hangs under", "links to", "required by", "named by"), rows)


def _spans(spans: list[SpanDefinition], declared: Registry) -> Iterator[str]:
    """The section about a span, or about several in a row with the same attributes."""
    first, *others = spans
    service = _code(first.emitter.service)
    if others:
        yield f"### {_code(first.name)} and {len(others)} others"
        yield f"From {service}."
        yield table(("span", "meaning"), ((_code(span.name), span.brief) for span in spans))
    else:
        yield f"### {_code(first.name)}"
        relation = "a root" if first.is_root else f"under {_parents(first, declared)}"
        yield f"{first.brief}. From {service}, kind {first.kind}; {relation}." + _events_of(first)
    if first.attributes:
        rows = ((_code(a.id), _type(a), _level(a), a.brief) for a in first.attributes.values())
        yield table(("attribute", "type", "required", "meaning"), rows)


def _events_of(span: SpanDefinition) -> str:
    return f" Events: {', '.join(_code(e.name) for e in span.events)}." if span.events else ""


def _type(attribute: AttributeDefinition) -> str:
    unit = f", {attribute.unit}" if attribute.unit else ""
    return f"{attribute.type}{unit}"


def _level(attribute: AttributeDefinition) -> str:
    return LEVELS[attribute.level] + attribute.condition


def _events(declared: Registry) -> str:
    rows = (
        (_code(event.name), ", ".join(_code(a) for a in event.attributes) or "-", event.brief)
        for event in declared.events.values()
    )
    return table(("event", "attributes", "meaning"), rows)


def _attributes(attributes: Iterable[AttributeDefinition]) -> str:
    rows = (
        (
            _code(a.id),
            _type(a),
            ", ".join(_code(str(m)) for m in a.members) or ", ".join(_code(_example(e)) for e in a.examples) or "-",
            a.stability,
            a.brief,
        )
        for a in sorted(attributes, key=lambda a: a.id)
    )
    return table(("attribute", "type, unit", "values or examples", "stability", "meaning"), rows)


def _example(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_example(item) for item in value)}]"
    return str(value) if value != "" else '""'


def _metrics(metrics: Iterable[MetricDefinition]) -> Iterator[str]:
    rows = (
        (
            _code(m.name),
            m.instrument,
            m.unit,
            ", ".join(_code(a) for a in m.attributes) or "-",
            m.origin,
            m.brief,
        )
        for m in metrics
    )
    yield table(("metric", "instrument", "unit", "attributes", "named by", "meaning"), rows)


def _others(declared: Registry) -> str:
    telemetry = {
        *declared.attributes,
        *(span.name.removesuffix("*") for span in declared.spans.values()),
        *(event.name for event in declared.events.values()),
        *(metric.name for metric in declared.metrics.values()),
        *(str(member) for attribute in declared.attributes.values() for member in attribute.members),
    }
    rows = ((_code(c.value), c.brief) for c in declared.constants if c.value not in telemetry)
    return table(("name", "meaning"), rows)
