"""What the scaler's traces say: each decision, and what became of the replicas that it started and stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmtrace.scenarios.facts import integer, number, strings, text
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Span, Trace

PHASES = (
    a.SCHEDULE_SPAN,
    a.IMAGE_PULL_SPAN,
    a.CONTAINER_START_SPAN,
    a.MODEL_LOAD_SPAN,
    a.READY_SPAN,
    a.FIRST_REQUEST_SPAN,
)
"""The phases of a replica's start; the first two with Kubernetes only."""


@dataclass(frozen=True)
class Replica:
    """A replica that a decision started or stopped.

    Times in nanoseconds since the epoch; ``phases`` has start and end.
    """

    name: str
    outcome: str
    failure: str
    start_ns: int
    end_ns: int
    phases: dict[str, tuple[int, int]] = field(default_factory=dict)
    running: int | None = None
    cut: int | None = None
    moved: int | None = None

    @property
    def up(self) -> bool:
        """Whether it was started."""
        return a.DRAIN_SPAN not in self.phases

    @property
    def ready_ns(self) -> int | None:
        """When it could serve."""
        return self.phases[a.READY_SPAN][1] if a.READY_SPAN in self.phases else None

    @property
    def useful_ns(self) -> int | None:
        """When it gave its first token; None where it never did."""
        return self.phases[a.FIRST_REQUEST_SPAN][1] if a.FIRST_REQUEST_SPAN in self.phases else None


@dataclass(frozen=True)
class Decision:
    """A scaling decision.

    ``window`` is from when to when its metric may have counted requests; ``links`` are trace ids.
    """

    id: str
    trace_id: str
    time_ns: int
    end_ns: int
    scaler: str
    direction: str
    reason: str
    metric: str
    query: str
    value: float | None
    target: float | None
    current: int
    ready: int
    recommended: int | None
    desired: int
    maximum: int
    stabilization: str
    limit: str
    missing: tuple[str, ...]
    failure: str
    window: tuple[int, int]
    accelerators: float
    price_per_hour: float
    links: frozenset[str]
    replicas: tuple[Replica, ...]

    @property
    def limited(self) -> bool:
        """Whether the metrics asked for more than the scaler may have."""
        return self.limit == a.LIMITED_MAX

    @property
    def ready_ns(self) -> int | None:
        """When the first of its replicas could serve."""
        return min((r.ready_ns for r in self.replicas if r.ready_ns is not None), default=None)

    @property
    def useful_ns(self) -> int | None:
        """When the first of its replicas gave its first token."""
        return min((r.useful_ns for r in self.replicas if r.useful_ns is not None), default=None)

    @property
    def driven(self) -> bool:
        """Whether requests drove it: it adds replicas, or would if it might."""
        return self.direction == a.SCALE_UP or self.limited


def read_decision(trace: Trace) -> Decision | None:
    """The decision of a trace; None where it is none."""
    root = next((s for s in trace.spans if s.name == a.DECISION_SPAN and s.service == a.SCALER_SERVICE), None)
    if root is None:
        return None
    told = root.attributes
    before_ms, after_ms = (number(told.get(key)) or 0.0 for key in (a.SCALE_WINDOW, a.SCALE_RESOLUTION))
    return Decision(
        id=text(told.get(a.SCALE_DECISION_ID)) or trace.trace_id,
        trace_id=trace.trace_id,
        time_ns=root.start_ns,
        end_ns=root.end_ns,
        scaler=text(told.get(a.SCALER_NAME)),
        direction=text(told.get(a.SCALE_DIRECTION)),
        reason=text(told.get(a.SCALE_REASON)),
        metric=text(told.get(a.SCALE_METRIC)),
        query=text(told.get(a.SCALE_QUERY)),
        value=number(told.get(a.SCALE_VALUE)),
        target=number(told.get(a.SCALE_TARGET)),
        current=integer(told.get(a.REPLICAS_CURRENT)) or 0,
        ready=integer(told.get(a.REPLICAS_READY)) or 0,
        recommended=integer(told.get(a.REPLICAS_RECOMMENDED)),
        desired=integer(told.get(a.REPLICAS_DESIRED)) or 0,
        maximum=integer(told.get(a.REPLICAS_MAX)) or 0,
        stabilization=text(told.get(a.SCALE_STABILIZATION)),
        limit=text(told.get(a.SCALE_LIMIT)),
        missing=tuple(strings(told.get(a.SCALE_MISSING))),
        failure=text(told.get(a.SCALE_FAILURE)),
        window=(root.start_ns - int(before_ms * 1e6), root.start_ns + int(after_ms * 1e6)),
        accelerators=number(told.get(a.ACCELERATORS)) or 1.0,
        price_per_hour=number(told.get(a.PRICE_PER_HOUR)) or 0.0,
        links=frozenset(link.trace_id for link in root.links),
        replicas=tuple(_replica(trace, span) for span in trace.named(a.REPLICA_SPAN)),
    )


def in_order(decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions in order of time; one whose trace was sent twice counts once."""
    return sorted({d.id: d for d in decisions}.values(), key=lambda d: d.time_ns)


def _replica(trace: Trace, span: Span) -> Replica:
    phases = {child.name: child for child in trace.children(span)}
    drain = phases.get(a.DRAIN_SPAN)
    about = drain.attributes if drain else {}
    return Replica(
        name=text(span.attributes.get(a.REPLICA)),
        outcome=text(span.attributes.get(a.OUTCOME)),
        failure=text(span.attributes.get(a.SCALE_FAILURE)),
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        phases={name: (child.start_ns, child.end_ns) for name, child in phases.items()},
        running=integer(about.get(a.DRAIN_RUNNING)),
        cut=integer(about.get(a.DRAIN_CUT)),
        moved=integer(about.get(a.DRAIN_MOVED)),
    )
