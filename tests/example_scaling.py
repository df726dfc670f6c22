"""Runs of an autoscaled stack in which it is known which request waited when, and which decision it drove."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmtrace.autoscale.record import DecisionRecord, MetricRecord, Phase, ReplicaRecord
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Stay
from llmtrace.traces.model import Link, Span, Trace

T0 = 1_800_000_000_000_000_000
SECOND = 1_000_000_000
MODEL, REPORTS = "smol", "smol-reports"
QUERY = f'sum(llm_d_epp_flow_control_queue_size{{model_name="{REPORTS}"}})'
CLIENT = {"service.name": a.CLIENT_SERVICE}
PICKER = {"service.name": a.PICKER_SERVICE}
SCALER = {"service.name": a.SCALER_SERVICE}


def ns(seconds: float) -> int:
    return T0 + round(seconds * SECOND)


def request(
    number: int,
    at: float,
    wait: float = 0.0,
    run: float = 1.0,
    *,
    kind: str = "reports",
    tokens: int = 100,
    queue_span: bool = True,
) -> Trace:
    """One request: its client, and of the picker what the answer reads."""
    trace_id = f"{number:032x}"
    model = REPORTS if kind == "reports" else MODEL
    arrived, dispatched, ended = ns(at), ns(at + wait), ns(at + wait + run)
    about: dict[str, Any] = {a.PAIR_ID: f"{kind}-{number}", a.TENANT: kind, a.ARM: "autoscaled", a.BLOCK: 0}
    usage = {a.INPUT_TOKENS: tokens - 10, a.OUTPUT_TOKENS: 10}

    def span(n: int, parent: int | None, name: str, start: int, end: int, resource: Any, attributes: Any) -> Span:
        return Span(
            trace_id,
            f"{n:016x}",
            None if parent is None else f"{parent:016x}",
            name,
            "INTERNAL",
            start,
            end,
            attributes=attributes,
            resource=resource,
        )

    spans = [
        span(1, None, "chat smol", arrived, ended, CLIENT, about),
        span(2, 1, a.GATEWAY_SPAN, arrived, ended, PICKER, usage),
        span(3, 2, a.ORCHESTRATION_SPAN, arrived, dispatched, PICKER, {a.TARGET_MODEL: model}),
        span(4, 3, a.PROFILE_SPAN, dispatched, dispatched, PICKER, {}),
    ]
    if queue_span:
        spans.append(span(5, 3, a.FLOW_SPAN, arrived, dispatched, PICKER, {}))
    return Trace(trace_id, tuple(spans))


def starts(
    name: str, at: float, start: float = 10, load: float = 5, ready: float = 2, first: float | None = 1
) -> ReplicaRecord:
    """A replica that is started; with ``first`` None it serves nothing."""
    record = ReplicaRecord(name=name, up=True, started_ns=ns(at))
    ends = ((a.CONTAINER_START_SPAN, start), (a.MODEL_LOAD_SPAN, load), (a.READY_SPAN, ready))
    for phase, seconds in (*ends, *([(a.FIRST_REQUEST_SPAN, first)] if first is not None else [])):
        at += seconds
        record.phase(phase, ns(at), a.SOURCE_LOG)
    record.end(a.OUTCOME_UNUSED if first is None else a.OUTCOME_SERVED, ns(at))
    return record


def fails(name: str, at: float, failure: str, after: float = 60) -> ReplicaRecord:
    record = ReplicaRecord(name=name, up=True, started_ns=ns(at))
    record.phases.append(
        Phase(name=a.CONTAINER_START_SPAN, start_ns=ns(at), end_ns=ns(at + after), source=a.SOURCE_PROBE)
    )
    record.end(a.OUTCOME_FAILED, ns(at + after), failure)
    return record


def stops(name: str, at: float, took: float = 3, running: int = 0, cut: int = 0) -> ReplicaRecord:
    record = ReplicaRecord(name=name, up=False, started_ns=ns(at), running=running, cut=cut)
    record.phase(a.DRAIN_SPAN, ns(at + took), a.SOURCE_PROBE)
    record.end(a.OUTCOME_CUT if cut else a.OUTCOME_DRAINED, ns(at + took))
    return record


def record(at: float, current: int, desired: int, value: float | None = 0.0, **changes: Any) -> DecisionRecord:
    """A decision on the reports' queue, with a target of 1 for each replica and at most 3 of them."""
    metric = MetricRecord(
        name="epp-queue-size",
        query=QUERY,
        target=1.0,
        target_type="AverageValue",
        value=value,
        proposal=None if value is None else int(value),
        failure="" if value is not None else "Prometheus does not answer",
    )
    values: dict[str, Any] = {
        "id": f"vllm-{ns(at)}",
        "scaler_kind": "ScaledObject",
        "scaler_name": "vllm",
        "time_ns": ns(at),
        "direction": a.SCALE_UP if desired > current else a.SCALE_DOWN if desired < current else a.SCALE_HOLD,
        "reason": "epp-queue-size above target" if desired >= current else "All metrics below target",
        "metric": "epp-queue-size",
        "metrics": [metric],
        "current": current,
        "ready": current,
        "recommended": None if value is None else int(value),
        "desired": desired,
        "minimum": 1,
        "maximum": 3,
        "stabilization": a.NOT_STABILIZED,
        "limit": a.LIMITED_MAX if value is not None and value > 3 else a.NOT_LIMITED,
        "window_ms": 1000.0,
        "accelerators": 1.0,
        "price_per_hour": 3.6,
        **changes,
    }
    return DecisionRecord(**values)


def decision_trace(told: DecisionRecord, drivers: list[Stay] | None = None) -> Trace:
    """The trace that the scaler sends of a decision."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource

    from llmtrace.autoscale.spans import DecisionSpans
    from llmtrace.traces import otlp

    made = DecisionSpans(told, Resource(SCALER), drivers or [], None if drivers is None else len(drivers)).spans()
    spans = tuple(otlp.spans(encode_spans(list(made)).resource_spans))
    return Trace(spans[0].trace_id, spans)


@dataclass
class Day:
    """A day with many decisions: each one's drivers, and what else there was, are known by their numbers."""

    requests: int
    decisions: int
    seed: int = 1
    drivers: list[set[str]] = field(default_factory=list)

    def traces(self) -> Iterator[Trace]:
        """Requests in groups around each decision: waiting reports that drive it, and chats and short waits around."""
        rng = random.Random(self.seed)
        each = self.requests // self.decisions
        period = 86_400 / self.decisions
        number, replicas = 1, 1
        for n in range(self.decisions):
            at = (n + 0.5) * period
            driving = 4 + n % 5
            mine = set()
            for k in range(each):
                if k < driving:  # waiting since before the window, until after the decision
                    trace = request(number, at - 3 - k, 4 + k, 2)
                    mine.add(trace.trace_id)
                elif k % 3 == 0:  # a chat that waits just as long, which the metric does not count
                    trace = request(number, at - 3, 5, 1, kind="chats")
                else:  # a report long before, or long after
                    trace = request(number, at + rng.choice([-1, 1]) * (8 + 20 * rng.random()), 0.2, 1)
                number += 1
                yield trace
            self.drivers.append(mine)
            up = n % 2 == 0
            replica = "vllm-1"
            work = [starts(replica, at)] if up else [stops(replica, at)]
            yield decision_trace(
                record(at, replicas, 2 if up else 1, float(driving), replicas=work, limit=a.NOT_LIMITED)
            )
            replicas = 2 if up else 1


def linked(trace: Trace, *trace_ids: str) -> Trace:
    """The decision with links to these traces."""
    from dataclasses import replace

    links = tuple(Link(trace_id, f"{2:016x}") for trace_id in trace_ids)
    return Trace(trace.trace_id, tuple(replace(s, links=links) if s.parent_id is None else s for s in trace.spans))
