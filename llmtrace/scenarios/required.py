"""What the trace of a scenario's request must have, as the registry of names declares it."""

from __future__ import annotations

from llmtrace.errors import UserError
from llmtrace.scenarios.expectation import COLLECTOR, Expectation, ExpectedSpan
from llmtrace.semconv.definitions import Registry, SpanDefinition
from llmtrace.semconv.format import ScenarioNotes

COLLECTOR_HINT = "do the collector and the store run and answer? see `llmtrace status`"


def expectation(declared: Registry, scenario: str, form: str = "") -> Expectation:
    """The required spans and edges of a scenario's trace of this form; UserError when the registry has none for it.

    Of the parents that the registry allows a span, those count that the scenario requires as well: the others may be
    absent, or stand in between.
    """
    required = [(span, told) for span, told in declared.required(scenario) if not told.forms or form in told.forms]
    if not required:
        raise UserError(f"the registry requires no span for the scenario {scenario!r}")
    keys: dict[str, list[str]] = {}
    for span, told in required:
        keys.setdefault(span.id, []).append(told.key)
    return Expectation(
        spans=tuple(_expected(span, told, keys) for span, told in required),
        hints={COLLECTOR: COLLECTOR_HINT} | {e.component: e.hint for e in declared.emitters if e.hint},
    )


def _expected(span: SpanDefinition, told: ScenarioNotes, keys: dict[str, list[str]]) -> ExpectedSpan:
    return ExpectedSpan(
        key=told.key,
        component=span.emitter.component,
        service=span.emitter.service,
        name=told.name or span.name,
        parents=tuple(told.under) or tuple(key for parent in span.parents for key in keys.get(parent, ())),
        kind=span.kind,
        attributes=tuple(told.attributes),
        many=told.many,
        count_from=(told.count.span, told.count.attribute) if told.count else None,
        may_end_late=told.may_end_late,
    )
