"""Spans and traces as the analyses see them, whatever backend they were read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

AttributeValue = str | bool | int | float | bytes | Sequence["AttributeValue"] | Mapping[str, "AttributeValue"] | None
"""An OTLP AnyValue as plain Python."""

Attributes = Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Event:
    """A span event. Time in nanoseconds since the Unix epoch."""

    name: str
    time_ns: int
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """A link from a span to another span, in this or another trace. Identifiers are lower-case hex."""

    trace_id: str
    span_id: str
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """One OpenTelemetry span with its resource and scope.

    ``trace_id`` (32 digits) and ``span_id``, ``parent_id`` (16 digits) are lower-case hex; times are nanoseconds since
    the Unix epoch; ``kind`` is one of INTERNAL, SERVER, CLIENT, PRODUCER, CONSUMER, UNSPECIFIED; ``status`` is one of
    UNSET, OK, ERROR.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: str
    start_ns: int
    end_ns: int
    status: str = "UNSET"
    status_message: str = ""
    attributes: Attributes = field(default_factory=dict)
    resource: Attributes = field(default_factory=dict)
    scope: str = ""
    events: tuple[Event, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def service(self) -> str:
        """The resource's service.name, or "" when it has none."""
        name = self.resource.get("service.name")
        return name if isinstance(name, str) else ""

    @property
    def instance(self) -> str:
        """The resource's service.instance.id, or "" when it has none."""
        instance = self.resource.get("service.instance.id")
        return instance if isinstance(instance, str) else ""

    @property
    def duration_ms(self) -> float:
        """Duration in milliseconds."""
        return (self.end_ns - self.start_ns) / 1e6


@dataclass(frozen=True)
class Trace:
    """All spans of one trace id, in order of start time."""

    trace_id: str
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(sorted(self.spans, key=lambda s: (s.start_ns, -s.end_ns, s.span_id))))

    @cached_property
    def by_id(self) -> dict[str, Span]:
        """Spans by span id. Of a span id that occurs twice, the earliest span."""
        index: dict[str, Span] = {}
        for span in self.spans:
            index.setdefault(span.span_id, span)
        return index

    @cached_property
    def _children(self) -> dict[str | None, list[Span]]:
        children: dict[str | None, list[Span]] = {}
        for span in self.spans:
            children.setdefault(span.parent_id, []).append(span)
        return children

    def children(self, span: Span) -> list[Span]:
        """Children of a span, in order of start time."""
        return self._children.get(span.span_id, [])

    def parent(self, span: Span) -> Span | None:
        """The parent, or None for a root and for an orphan."""
        return self.by_id.get(span.parent_id) if span.parent_id else None

    @cached_property
    def roots(self) -> list[Span]:
        """Spans without a parent id."""
        return self._children.get(None, [])

    @cached_property
    def orphans(self) -> list[Span]:
        """Spans whose parent id names no span of the trace."""
        return [s for s in self.spans if s.parent_id is not None and s.parent_id not in self.by_id]

    @cached_property
    def duplicates(self) -> list[str]:
        """Span ids that occur more than once."""
        return [span_id for span_id, n in Counter(s.span_id for s in self.spans).items() if n > 1]

    def named(self, *names: str) -> list[Span]:
        """Spans with one of these names, in order of start time."""
        return [s for s in self.spans if s.name in names]

    def ancestors(self, span: Span) -> Iterator[Span]:
        """The parent, its parent, and so on; stops at a root, an orphan, or a cycle."""
        seen = {span.span_id}
        parent = self.parent(span)
        while parent is not None and parent.span_id not in seen:
            yield parent
            seen.add(parent.span_id)
            parent = self.parent(parent)

    def walk(self) -> Iterator[tuple[int, Span]]:
        """Depth-first (depth, span), roots and orphans first level, each span once."""
        seen: set[int] = set()
        stack = [(0, s) for s in reversed(self.roots + self.orphans)]
        while stack:
            depth, span = stack.pop()
            if id(span) in seen:
                continue
            seen.add(id(span))
            yield depth, span
            stack.extend((depth + 1, s) for s in reversed(self.children(span)))
