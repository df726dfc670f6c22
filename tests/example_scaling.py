"""Runs of an autoscaled stack in which it is known which request waited when, and which decision it drove."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmtrace.autoscale.evidence import Drivers
from llmtrace.autoscale.record import DecisionRecord, MetricRecord, Phase, ReplicaRecord
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Link, Span, Trace

T0 = 1_800_000_000_000_000_000
SECOND = 1_000_000_000
MODEL, REPORTS = "smol", "smol-reports"
QUERY = f'sum(llm_d_epp_flow_control_queue_size{{model_name="{REPORTS}"}})'
CLIENT = {"service.name": a.CLIENT_SERVICE}
ENVOY = {"service.name": "envoy"}
PICKER = {"service.name": a.PICKER_SERVICE}
VLLM = {"service.name": "vllm"}
SCALER = {"service.name": a.SCALER_SERVICE}


SCORER = {a.SCORER_TYPE: "queue-scorer", a.SCORER_WEIGHT: 1.0}
ENDPOINTS = ["default/vllm-0"]


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
    ttft: float = 0.05,
    queue_span: bool = True,
) -> Trace:
    """One request with all that its trace must have; ``ttft`` is the model server's."""
    trace_id = f"{number:032x}"
    model = REPORTS if kind == "reports" else MODEL
    arrived, dispatched, ended = ns(at), ns(at + wait), ns(at + wait + run)
    usage = {a.INPUT_TOKENS: tokens - 10, a.OUTPUT_TOKENS: 10}
    about: dict[str, Any] = {
        a.OPERATION: "chat", a.REQUEST_MODEL: model, **usage,
        a.CLIENT_TTFT: (wait + ttft) * 1e3, a.CLIENT_E2E: (wait + run) * 1e3,
        a.RUN_ID: "day", a.ARM: "autoscaled", a.BLOCK: 0, a.PAIR_ID: f"{kind}-{number}", a.TENANT: kind,
    }  # fmt: skip
    served = {a.VLLM_PROMPT_TOKENS: tokens - 10, a.VLLM_TTFT: ttft}

    def span(
        n: int, parent: int, name: str, start: int, end: int, resource: Any, attributes: Any, kind: str = "INTERNAL"
    ) -> Span:
        above = f"{parent:016x}" if parent else None
        return Span(
            trace_id, f"{n:016x}", above, name, kind, start, end, attributes=dict(attributes), resource=resource
        )

    spans = [
        span(1, 0, f"chat {model}", arrived, ended, CLIENT, about, "CLIENT"),
        span(6, 1, "ingress", arrived, ended, ENVOY, {}, "SERVER"),
        span(2, 6, a.GATEWAY_SPAN, arrived, ended, PICKER, usage, "SERVER"),
        span(3, 2, a.ORCHESTRATION_SPAN, arrived, dispatched, PICKER, {a.TARGET_MODEL: model}, "SERVER"),
        span(4, 3, a.PROFILE_SPAN, dispatched, dispatched, PICKER, {a.PROFILE_NAME: "default"}),
        span(7, 4, a.FILTER_SPAN, dispatched, dispatched, PICKER, {}),
        span(8, 4, a.SCORING_SPAN, dispatched, dispatched, PICKER, {a.SCORER_COUNT: 1}),
        span(9, 8, f"{a.SCORER_SPAN_PREFIX}queue-scorer", dispatched, dispatched, PICKER, SCORER),
        span(10, 4, a.PICK_SPAN, dispatched, dispatched, PICKER, {a.TOP_ENDPOINTS: ENDPOINTS}),
        span(11, 2, a.SERVER_SPAN, dispatched, ended, VLLM, served, "SERVER"),
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
        "window_ms": WINDOW_S * 1e3,
        "accelerators": 1.0,
        "price_per_hour": 3.6,
        **changes,
    }
    return DecisionRecord(**values)


def decision_trace(told: DecisionRecord, drivers: Drivers | None = None) -> Trace:
    """The trace that the scaler sends of a decision."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource

    from llmtrace.autoscale.spans import DecisionSpans
    from llmtrace.traces import otlp

    made = DecisionSpans(told, Resource(SCALER), drivers).spans()
    spans = tuple(otlp.spans(encode_spans(list(made)).resource_spans))
    return Trace(spans[0].trace_id, spans)


WINDOW_S = 1.0
"""How old the samples may be that :func:`record` decides on."""
EDGE_S = 0.05
BOUNDARY = (
    (-2.5, -WINDOW_S - EDGE_S, False),
    (-2.5, -WINDOW_S + EDGE_S, True),
    (-EDGE_S, 1.5, True),
    (EDGE_S, 1.5, False),
    (-2.5, -1.5, False),
    (0.5, 1.5, False),
)
"""Reports that wait from when until when, in seconds after a decision, and whether its metric may have counted them."""


@dataclass
class Day:
    """A day with many decisions: each one's drivers, and what else there was, are known by their numbers.

    With ``shift_s`` the decisions say that they were taken so much later than they were.
    """

    requests: int
    decisions: int
    seed: int = 1
    shift_s: float = 0.0
    drivers: list[set[str]] = field(default_factory=list)

    def traces(self) -> Iterator[Trace]:
        """Requests in groups around each decision: waiting reports that drive it, others that wait until just before
        its window, or from just after it, and chats and short waits around."""
        rng = random.Random(self.seed)
        each = self.requests // self.decisions
        period = 86_400 / self.decisions
        number, replicas = 1, 1
        for n in range(self.decisions):
            at = (n + 0.5) * period
            driving = 4 + n % 5
            mine = set()
            for k in range(each):
                edge = k - driving
                if edge < 0:  # waiting since before the window, until after the decision
                    trace = request(number, at - 3 - k, 4 + k, 2)
                    mine.add(trace.trace_id)
                elif edge < len(BOUNDARY):
                    since, until, inside = BOUNDARY[edge]
                    trace = request(number, at + since, until - since, 2)
                    mine |= {trace.trace_id} if inside else set()
                elif k % 3 == 0:  # a chat that waits just as long, which the metric does not count
                    trace = request(number, at - 3, 5, 1, kind="chats")
                else:  # a report long before, or long after
                    trace = request(number, at + rng.choice([-1, 1]) * (8 + 20 * rng.random()), 0.2, 1)
                number += 1
                yield trace
            self.drivers.append(mine)
            up = n % 2 == 0
            replica, taken = "vllm-1", at + self.shift_s
            work = [starts(replica, taken)] if up else [stops(replica, taken)]
            # As many as waited in the middle of the window.
            yield decision_trace(
                record(taken, replicas, 2 if up else 1, float(driving), replicas=work, limit=a.NOT_LIMITED)
            )
            replicas = 2 if up else 1


def linked(trace: Trace, *trace_ids: str) -> Trace:
    """The decision with links to these traces."""
    from dataclasses import replace

    links = tuple(Link(trace_id, f"{2:016x}") for trace_id in trace_ids)
    return Trace(trace.trace_id, tuple(replace(s, links=links) if s.parent_id is None else s for s in trace.spans))
