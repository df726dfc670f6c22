"""What a request was at the gateway, moment by moment, and which of the picker's metrics counted it.

A scaler sees numbers; which requests they were made of follows from the requests' traces: a request is in
``flow_control_queue_size`` from its arrival until it may be scheduled, and in ``request_running`` from then on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Trace

_NAME = re.compile(r"llm_d_epp_\w+|inference_\w+")
_MODEL = re.compile(r'(?:target_)?model_name\s*=\s*"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Stay:
    """A request at the gateway. Times in nanoseconds since the epoch.

    It waited from ``arrived_ns`` to ``dispatched_ns`` and ran from then to ``ended_ns``; where it was never
    dispatched the latter two are equal. ``span_id`` is that of ``gateway.request``.
    """

    trace_id: str
    span_id: str
    model: str
    arrived_ns: int
    dispatched_ns: int
    ended_ns: int


def stay(trace: Trace) -> Stay | None:
    """The request of a trace at the gateway; None where the trace has none.

    Where the picker traces its queue, that span tells the wait; else, as with llm-d's own, it is the time from the
    start of the orchestration to the first scheduling profile.
    """
    gateway = orchestration = queue = profile = None
    for span in trace.spans:
        name = span.name
        if name == a.GATEWAY_SPAN:
            gateway = gateway or span
        elif name == a.ORCHESTRATION_SPAN:
            orchestration = orchestration or span
        elif name == a.FLOW_SPAN:
            queue = queue or span
        elif name == a.PROFILE_SPAN:
            profile = profile or span
    if gateway is None or orchestration is None:
        return None
    model = orchestration.attributes.get(a.TARGET_MODEL) or orchestration.attributes.get(a.REQUEST_MODEL)
    arrived = queue.start_ns if queue else orchestration.start_ns
    dispatched = profile.start_ns if profile else gateway.end_ns
    if queue and profile:
        dispatched = queue.end_ns
    return Stay(
        trace.trace_id,
        gateway.span_id,
        model if isinstance(model, str) else "",
        arrived,
        dispatched,
        max(gateway.end_ns, dispatched),
    )


class Part(StrEnum):
    """The part of a request's stay that a metric counts."""

    WAITING = "waiting"
    RUNNING = "running"
    ALL = "all"


@dataclass(frozen=True)
class Demand:
    """The requests that a query counts: in which part of their stay, and of which model (None: of any)."""

    part: Part
    model: str | None = None

    def interval(self, found: Stay) -> tuple[int, int]:
        """When the request is counted, as far as its model is."""
        if self.part is Part.WAITING:
            return found.arrived_ns, found.dispatched_ns
        if self.part is Part.RUNNING:
            return found.dispatched_ns, found.ended_ns
        return found.arrived_ns, found.ended_ns

    def counts(self, found: Stay, since_ns: int, until_ns: int) -> bool:
        """Whether the query counted the request at some time from ``since_ns`` to ``until_ns``."""
        start, end = self.interval(found)
        return (self.model is None or found.model == self.model) and start < until_ns and end > since_ns and end > start


def demand(query: str) -> Demand:
    """What a PromQL query over the picker's metrics counts; one that is not known counts a request's whole stay."""
    names = " ".join(_NAME.findall(query))
    part = Part.ALL
    if "queue_size" in names or "queue_bytes" in names:
        part = Part.WAITING
    elif "running" in names:
        part = Part.RUNNING
    model = _MODEL.search(query)
    return Demand(part, model[1].replace('\\"', '"').replace("\\\\", "\\") if model else None)
