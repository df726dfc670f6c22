"""A recorded decision as the spans of one trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from llmtrace.autoscale.evidence import MOST_LINKS, Drivers
from llmtrace.autoscale.record import DecisionRecord, ReplicaRecord
from llmtrace.semconv import attributes as a

SCOPE = InstrumentationScope("llmtrace.autoscale")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class DecisionSpans:
    """Makes the spans of one decision. ``drivers`` are the requests that drove it, None where nobody could be asked or
    can tell; the first :data:`~llmtrace.autoscale.evidence.MOST_LINKS` of them are linked."""

    def __init__(self, decision: DecisionRecord, resource: Resource, drivers: Drivers | None = None) -> None:
        self._decision = decision
        self._resource = resource
        self._drivers = drivers

    def spans(self) -> Iterator[ReadableSpan]:
        """The spans, parents first."""
        decision = self._decision
        ends = [r.ended_ns or r.started_ns for r in decision.replicas]
        end_ns = max([decision.time_ns, *ends])
        failed = [r for r in decision.replicas if r.outcome == a.OUTCOME_FAILED]
        yield self._span(a.DECISION_SPAN, (), None, decision.time_ns, end_ns, self._attributes(), links=self._links())
        if not decision.replicas:
            return
        counts: dict[str, AttributeValue] = {
            a.REPLICAS_CURRENT: decision.current,
            a.REPLICAS_DESIRED: decision.desired,
        }
        start_ns = min(r.started_ns for r in decision.replicas)
        failure = "; ".join(f"{r.name}: {r.failure}" for r in failed)
        yield self._span(a.APPLY_SPAN, ("apply",), (), start_ns, end_ns, counts, failure=failure)
        for number, replica in enumerate(decision.replicas):
            yield from self._replica(replica, f"{replica.name}-{number}")

    def _replica(self, replica: ReplicaRecord, key: str) -> Iterator[ReadableSpan]:
        attributes: dict[str, AttributeValue] = {a.REPLICA: replica.name, a.OUTCOME: replica.outcome or ""}
        if replica.failure:
            attributes[a.SCALE_FAILURE] = replica.failure
        path = ("apply", key)
        end_ns = replica.ended_ns or replica.started_ns
        yield self._span(
            a.REPLICA_SPAN, path, ("apply",), replica.started_ns, end_ns, attributes, failure=replica.failure
        )
        for phase in replica.phases:
            about: dict[str, AttributeValue] = {a.REPLICA: replica.name, a.PHASE_SOURCE: phase.source}
            if phase.name == a.DRAIN_SPAN:
                counts = {
                    a.DRAIN_RUNNING: replica.running,
                    a.DRAIN_CUT: replica.cut,
                    a.DRAIN_MOVED: replica.moved,
                }
                about |= {key: value for key, value in counts.items() if value is not None}
            yield self._span(phase.name, (*path, phase.name), path, phase.start_ns, phase.end_ns, about)

    def _attributes(self) -> dict[str, AttributeValue]:
        decision = self._decision
        told: dict[str, AttributeValue | None] = {
            a.SCALE_DECISION_ID: decision.id,
            a.SCALER_KIND: decision.scaler_kind,
            a.SCALER_NAME: decision.scaler_name,
            a.SCALE_DIRECTION: decision.direction,
            a.SCALE_REASON: decision.reason,
            a.REPLICAS_CURRENT: decision.current,
            a.REPLICAS_READY: decision.ready,
            a.REPLICAS_RECOMMENDED: decision.recommended,
            a.REPLICAS_DESIRED: decision.desired,
            a.REPLICAS_MIN: decision.minimum,
            a.REPLICAS_MAX: decision.maximum,
            a.SCALE_STABILIZATION: decision.stabilization,
            a.SCALE_LIMIT: decision.limit,
            a.SCALE_WINDOW: decision.window_ms,
            a.SCALE_RESOLUTION: decision.resolution_ms or None,
            a.ACCELERATORS: decision.accelerators,
            a.PRICE_PER_HOUR: decision.price_per_hour,
        }
        if self._drivers is not None:
            told |= {
                a.DRIVERS_FOUND: len(self._drivers.stays),
                a.DRIVERS_LINKED: len(self._drivers.stays[:MOST_LINKS]),
                a.DRIVERS_UNREAD: self._drivers.unread,
            }
        known = [m for m in decision.metrics if m.value is not None]
        if known:
            first = next((m for m in known if m.name == decision.metric), known[0])
            told |= {
                a.SCALE_METRIC: first.name,
                a.SCALE_QUERY: first.query,
                a.SCALE_VALUE: float(first.value or 0.0),
                a.SCALE_TARGET: float(first.target),
                a.SCALE_TARGET_TYPE: first.target_type,
                a.SCALE_METRICS: [m.name for m in known],
                a.SCALE_VALUES: [float(m.value or 0.0) for m in known],
                a.SCALE_PROPOSALS: [m.proposal or 0 for m in known],
            }
        if missing := [m for m in decision.metrics if m.value is None]:
            told |= {a.SCALE_MISSING: [m.name for m in missing], a.SCALE_FAILURE: missing[0].failure}
        return {key: value for key, value in told.items() if value is not None}

    def _links(self) -> list[Link]:
        return [
            Link(SpanContext(int(d.trace_id, 16), int(d.span_id, 16), is_remote=True, trace_flags=_SAMPLED))
            for d in (self._drivers.stays[:MOST_LINKS] if self._drivers else ())
        ]

    def _span(
        self,
        name: str,
        path: tuple[str, ...],
        parent: tuple[str, ...] | None,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, AttributeValue],
        *,
        links: Sequence[Link] = (),
        failure: str = "",
    ) -> ReadableSpan:
        return ReadableSpan(
            name=name,
            context=self._context(path),
            parent=None if parent is None else self._context(parent),
            resource=self._resource,
            attributes=attributes,
            links=links,
            kind=SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, failure) if failure else Status(),
            start_time=start_ns,
            end_time=max(end_ns, start_ns),
            instrumentation_scope=SCOPE,
        )

    def _context(self, path: tuple[str, ...]) -> SpanContext:
        return SpanContext(
            self._decision.trace_id, self._decision.span_id(*path), is_remote=False, trace_flags=_SAMPLED
        )
