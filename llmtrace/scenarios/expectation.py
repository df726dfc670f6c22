"""The trace that a request must produce, declared as data, and the check of a trace against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict

from llmtrace.traces.model import Span, Trace

CLOCK_TOLERANCE_MS = 10.0
"""How far a child may lie outside of its parent's time: clocks of different hosts, and spans that a proxy
closes only after it has handed the last byte on."""


COLLECTOR = "collector"
"""The component to look at when a trace is missing as a whole: everything passes through it."""


class Fault(StrEnum):
    """What can be wrong with a trace."""

    MISSING = "missing"
    COUNT = "count"
    PARENT = "parent"
    ROOT = "root"
    ORPHAN = "orphan"
    CYCLE = "cycle"
    DUPLICATE = "duplicate"
    TIME = "time"
    ATTRIBUTE = "attribute"
    ERROR = "error"
    TRACE_ID = "trace-id"
    DECISION = "decision"
    REASON = "reason"


class Problem(BaseModel):
    """One thing that is wrong with a trace, the component that is to blame, and where to look."""

    model_config = ConfigDict(frozen=True)
    trace_id: str
    fault: Fault
    component: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class ExpectedSpan:
    """A span that a trace must have.

    ``name`` and ``service`` are shell-style patterns. ``parents`` are keys of other expected spans, any of
    which may be the parent; none makes the span a root. ``count_from`` names the expected span and its
    attribute that say how many there must be; otherwise one or, with ``many``, at least one. ``may_end_late``
    allows the span to outlive its parent.
    """

    key: str
    component: str
    service: str
    name: str
    parents: tuple[str, ...] = ()
    kind: str | None = None
    attributes: tuple[str, ...] = ()
    many: bool = False
    count_from: tuple[str, str] | None = None
    may_end_late: bool = False

    def matches(self, span: Span) -> bool:
        """Whether the span is one of these."""
        return (
            fnmatchcase(span.service, self.service)
            and fnmatchcase(span.name, self.name)
            and self.kind in (None, span.kind)
        )


@dataclass(frozen=True)
class Expectation:
    """Everything that a scenario expects of one request's trace.

    ``hints`` says for each component what to look at when it sent no spans. With ``may_fail`` a span with an error is
    no fault: it tells truly of something that failed.
    """

    spans: tuple[ExpectedSpan, ...]
    hints: Mapping[str, str]
    may_fail: bool = False

    def __post_init__(self) -> None:
        keys = {e.key for e in self.spans}
        named = {p for e in self.spans for p in e.parents} | {e.count_from[0] for e in self.spans if e.count_from}
        if unknown := named - keys:
            raise ValueError(f"an expectation refers to unknown spans: {', '.join(sorted(unknown))}")

    def classify(self, trace: Trace) -> dict[int, ExpectedSpan | None]:
        """The expected span that each span is, by its ``id()``.

        Where several match, it is the one that belongs under the nearest expected span above; where that does not
        decide, the first that no span is yet.
        """
        found: dict[int, ExpectedSpan | None] = {}
        taken: set[str] = set()
        for span in (*(s for _, s in trace.walk()), *trace.spans):  # parents first; a cycle's spans come last
            if id(span) in found:
                continue
            matching = [e for e in self.spans if e.matches(span)]
            if len(matching) > 1:
                above = next((e for s in trace.ancestors(span) if (e := found.get(id(s)))), None)
                matching = [e for e in matching if above is not None and above.key in e.parents] or matching
            chosen = next((e for e in matching if e.key not in taken), matching[0] if matching else None)
            found[id(span)] = chosen
            if chosen is not None:
                taken.add(chosen.key)
        return found

    def without(self, component: str) -> Expectation:
        """The same of a trace in which a component has no part; what hung under its spans are roots."""
        gone = {e.key for e in self.spans if e.component == component}
        return replace(
            self,
            spans=tuple(
                replace(e, parents=tuple(p for p in e.parents if p not in gone))
                for e in self.spans
                if e.key not in gone
            ),
        )

    def component(self, span: Span) -> str:
        """The component that sent a span, by its service."""
        return next(
            (e.component for e in self.spans if fnmatchcase(span.service, e.service)),
            span.service or "unknown",
        )


def verify_trace(
    trace: Trace, expectation: Expectation, *, clock_tolerance_ms: float = CLOCK_TOLERANCE_MS
) -> list[Problem]:
    """Everything in which a trace differs from the expectation; an empty list is a good trace.

    Spans that the expectation does not know are welcome, as long as they hang in the same tree, once each and
    in time.
    """
    return list(_Verification(trace, expectation, clock_tolerance_ms).problems())


class _Verification:
    def __init__(self, trace: Trace, expectation: Expectation, clock_tolerance_ms: float) -> None:
        self.trace = trace
        self.expectation = expectation
        self.tolerance_ns = int(clock_tolerance_ms * 1e6)
        self.tolerance_ms = clock_tolerance_ms
        self.classes = expectation.classify(trace)
        self.distinct = tuple(trace.by_id.values())

    def problems(self) -> Iterator[Problem]:
        if not self.trace.spans:
            message = "no span of the trace arrived in the store"
            yield self._problem(Fault.MISSING, COLLECTOR, message)
            return
        for expected in self.expectation.spans:
            yield from self._presence(expected)
        yield from self._shape()
        for span in self.distinct:
            yield from self._identity(span)
            yield from self._time(span)
            if expected_span := self.classes[id(span)]:
                yield from self._against(span, expected_span)

    def _problem(self, fault: Fault, component: str, message: str) -> Problem:
        hint = self.expectation.hints.get(component, "")
        return Problem(trace_id=self.trace.trace_id, fault=fault, component=component, message=message, hint=hint)

    def _component(self, span: Span) -> str:
        expected = self.classes[id(span)]
        return expected.component if expected else self.expectation.component(span)

    def _found(self, key: str) -> list[Span]:
        return [s for s in self.distinct if (e := self.classes[id(s)]) is not None and e.key == key]

    def _presence(self, expected: ExpectedSpan) -> Iterator[Problem]:
        found = len(self._found(expected.key))
        if found == 0:
            # Below another component's span that is missing itself, nothing is known of this one.
            above = [
                e for e in self.expectation.spans if e.key in expected.parents and e.component != expected.component
            ]
            if not above or any(self._found(key) for key in expected.parents):
                yield self._problem(Fault.MISSING, expected.component, f"no span {self._described(expected)}")
            return
        wanted = None if expected.many else 1
        if expected.count_from:
            key, attribute = expected.count_from
            counts = [n for s in self._found(key) if isinstance(n := s.attributes.get(attribute), int)]
            wanted = sum(counts) if counts else None
        if wanted is not None and found != wanted:
            message = f"{found} spans {self._described(expected)} where {wanted} must be"
            fault = Fault.MISSING if found < wanted else Fault.COUNT
            yield self._problem(fault, expected.component, message)

    def _described(self, expected: ExpectedSpan) -> str:
        """Name and sender; where the expectation has it in several places, also whose descendant it is."""
        spans = self.expectation.spans
        text, step = f"{expected.name!r} from {expected.component}", expected
        for _ in spans:
            if not step.parents or sum((e.name, e.service) == (step.name, step.service) for e in spans) == 1:
                break
            step = next(e for e in spans if e.key == step.parents[0])
            text += f" under {step.name!r}"
        return text

    def _shape(self) -> Iterator[Problem]:
        for span_id in self.trace.duplicates:
            span = self.trace.by_id[span_id]
            yield self._problem(
                Fault.DUPLICATE,
                self._component(span),
                f"span {span.name!r} ({span_id}) came more than once",
            )
        for span in self.trace.orphans:
            yield from self._orphan(span)
        for span in self.trace.roots:
            expected = self.classes[id(span)]
            if expected is None or expected.parents:
                component = self._component(span)
                yield self._problem(Fault.ROOT, component, f"span {span.name!r} of {component} has no parent")
        reached = {id(span) for _, span in self.trace.walk()}
        for span in self.distinct:
            if id(span) not in reached:
                component = self._component(span)
                yield self._problem(Fault.CYCLE, component, f"span {span.name!r} of {component} is its own ancestor")

    def _orphan(self, span: Span) -> Iterator[Problem]:
        component = self._component(span)
        expected = self.classes[id(span)]
        absent = [
            e for e in self.expectation.spans if expected and e.key in expected.parents and not self._found(e.key)
        ]
        suspects = " or ".join(f"{e.name!r} from {e.component}" for e in absent)
        yield self._problem(
            Fault.ORPHAN,
            absent[0].component if absent else component,
            f"span {span.name!r} of {component} hangs under {span.parent_id}, which is not in the trace"
            + (f": it should be {suspects}" if suspects else ""),
        )

    def _identity(self, span: Span) -> Iterator[Problem]:
        if span.trace_id != self.trace.trace_id:
            component = self._component(span)
            yield self._problem(Fault.TRACE_ID, component, f"span {span.name!r} belongs to trace {span.trace_id}")
        if span.status == "ERROR" and not self.expectation.may_fail:
            component = self._component(span)
            text = f": {span.status_message}" if span.status_message else ""
            yield self._problem(Fault.ERROR, component, f"span {span.name!r} of {component} ended with an error{text}")

    def _time(self, span: Span) -> Iterator[Problem]:
        component = self._component(span)
        if span.end_ns < span.start_ns:
            yield self._problem(Fault.TIME, component, f"span {span.name!r} of {component} ends before it starts")
        parent = self.trace.parent(span)
        if parent is None:
            return
        expected = self.classes[id(span)]
        early = parent.start_ns - span.start_ns
        late = max(span.end_ns, span.start_ns) - parent.end_ns
        for excess, word in ((early, "starts {:.1f} ms before"), (late, "ends {:.1f} ms after")):
            if excess > self.tolerance_ns and not (excess == late and expected and expected.may_end_late):
                yield self._problem(
                    Fault.TIME,
                    component,
                    f"span {span.name!r} of {component} {word.format(excess / 1e6)} "
                    f"its parent {parent.name!r} (tolerance {self.tolerance_ms:g} ms)",
                )

    def _against(self, span: Span, expected: ExpectedSpan) -> Iterator[Problem]:
        if missing := [name for name in expected.attributes if span.attributes.get(name) is None]:
            yield self._problem(
                Fault.ATTRIBUTE,
                expected.component,
                f"span {span.name!r} of {expected.component} lacks {', '.join(missing)}",
            )
        parent = self.trace.parent(span)
        if parent is not None and not self._allowed(parent, expected) and self._has_any(expected.parents):
            yield self._problem(
                Fault.PARENT,
                expected.component,
                f"span {span.name!r} of {expected.component} hangs under {parent.name!r} of "
                f"{self._component(parent)}, not under "
                f"{' or '.join(expected.parents) or 'nothing'}",
            )
        elif span.parent_id is not None and not expected.parents:
            yield self._problem(
                Fault.PARENT,
                expected.component,
                f"span {span.name!r} of {expected.component} must be the root",
            )

    def _has_any(self, keys: tuple[str, ...]) -> bool:
        """Whether a place is there at all; where it is not, its absence is the problem, and not who lacks it."""
        return not keys or any(self._found(key) for key in keys)

    def _allowed(self, parent: Span, expected: ExpectedSpan) -> bool:
        """Whether the parent is one of the expected; helper spans of the same component may stand between."""
        step: Span | None = parent
        for step in (parent, *self.trace.ancestors(parent)):
            known = self.classes[id(step)]
            if known is not None:
                return known.key in expected.parents
        return False
