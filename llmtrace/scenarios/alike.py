"""Checks many traces fast: one that is like another that was found good need not be analysed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from llmtrace.scenarios.expectation import CLOCK_TOLERANCE_MS, Expectation, Problem, verify_trace
from llmtrace.traces.model import Attributes, AttributeValue, Trace

MOST_PATTERNS = 10_000
"""Good traces that are remembered as patterns."""


class _Row(NamedTuple):
    """What a span must be for its trace to be as good as the pattern's.

    ``above`` is its parent's place among the spans, ``needed`` gets the attributes that must be there, ``told`` are
    those that must have this value, for they say how many spans there must be.
    """

    service: str
    kind: str
    status: str
    above: int | None
    late: bool
    needed: Callable[[Attributes], tuple[AttributeValue, ...]] | None
    told: tuple[tuple[str, AttributeValue], ...]


@dataclass(frozen=True)
class _Pattern:
    expectation: Expectation
    rows: tuple[_Row, ...]

    @classmethod
    def of(cls, trace: Trace, expectation: Expectation) -> _Pattern:
        classes = expectation.classify(trace)
        places = {span.span_id: place for place, span in enumerate(trace.spans)}
        counting = {e.count_from for e in expectation.spans if e.count_from}
        rows = []
        for span in trace.spans:
            expected = classes[id(span)]
            rows.append(
                _Row(
                    service=span.service,
                    kind=span.kind,
                    status=span.status,
                    above=None if span.parent_id is None else places[span.parent_id],
                    late=expected is not None and expected.may_end_late,
                    # Of one name alone, itemgetter gives no tuple.
                    needed=itemgetter(*expected.attributes, expected.attributes[0])
                    if expected and expected.attributes
                    else None,
                    told=tuple(
                        (name, span.attributes.get(name)) for key, name in counting if expected and key == expected.key
                    ),
                )
            )
        return cls(expectation, tuple(rows))

    def like(self, trace: Trace, tolerance_ns: int) -> bool:
        """Whether a trace whose spans have the same names is as good; no means that nothing is known."""
        spans, trace_id = trace.spans, trace.trace_id
        if len({span.span_id for span in spans}) < len(spans):
            return False
        for span, (service, kind, status, above, late, needed, told) in zip(spans, self.rows, strict=True):
            start, end = span.start_ns, span.end_ns
            if (
                span.kind != kind
                or span.status != status
                or span.trace_id != trace_id
                or end < start
                or span.resource.get("service.name") != service
            ):
                return False
            if above is None:
                if span.parent_id is not None:
                    return False
            else:
                parent = spans[above]
                if (
                    span.parent_id != parent.span_id
                    or start < parent.start_ns - tolerance_ns
                    or (end > parent.end_ns + tolerance_ns and not late)
                ):
                    return False
            try:
                if needed is not None and None in needed(span.attributes):
                    return False
            except KeyError:
                return False
            for name, value in told:
                if span.attributes.get(name) != value:
                    return False
        return True


class Verifier:
    """Says of one trace after the other what :func:`~llmtrace.scenarios.expectation.verify_trace` says.

    ``expectation`` gives what a trace must have, preferably the same object for traces of the same form.
    """

    def __init__(
        self, expectation: Callable[[Trace], Expectation], clock_tolerance_ms: float = CLOCK_TOLERANCE_MS
    ) -> None:
        self._expectation = expectation
        self._tolerance_ms = clock_tolerance_ms
        self._tolerance_ns = int(clock_tolerance_ms * 1e6)
        self._good: dict[tuple[str, ...], list[_Pattern]] = {}
        self._patterns = 0

    def problems(self, trace: Trace) -> list[Problem]:
        """Everything that is wrong with a trace."""
        expectation = self._expectation(trace)
        names = tuple([span.name for span in trace.spans])
        for pattern in self._good.get(names, ()):
            if pattern.expectation is expectation and pattern.like(trace, self._tolerance_ns):
                return []
        found = verify_trace(trace, expectation, clock_tolerance_ms=self._tolerance_ms)
        if not found and self._patterns < MOST_PATTERNS:
            self._good.setdefault(names, []).append(_Pattern.of(trace, expectation))
            self._patterns += 1
        return found
