"""Makes the spans of steps, in a thread of its own, when their marks have come, and sums them up for metrics."""

from __future__ import annotations

import contextlib
import importlib
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanContext, TraceFlags
from opentelemetry.util.types import AttributeValue

from llmtrace import __version__
from llmtrace.engine.hooks import Guard, logger
from llmtrace.engine.steps.batch import MAX_LINKS
from llmtrace.engine.steps.clocks import Clock
from llmtrace.engine.steps.ids import span_id, trace_id
from llmtrace.engine.steps.recorder import Phases, Record, phases
from llmtrace.engine.steps.totals import Totals
from llmtrace.semconv import attributes as names

QUEUE_SIZE = 1024
"""Steps whose spans are yet to be made; beyond it they are dropped and counted in the log."""
PAUSE_S = 0.1
"""Between two looks at marks that have not come."""
FLUSH_S = 2.0
"""That a process waits at its end for the spans of its last steps."""
MARKS_S = 30.0
"""After which a step whose marks have not come is given up."""
NODE_VARIABLES = ("LLMTRACE_NODE", "K8S_NODE_NAME", "NODE_NAME")
_EXPORTERS = "opentelemetry.exporter.otlp.proto"
_NS_PER_MS = 1_000_000
_MOST_ATTRIBUTE_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class Rank:
    """Who computes here. ``ranks`` are all that step together."""

    world: int
    ranks: int
    dp: int
    tp: int
    ep: int | None
    node: str
    all2all: str | None


def node_name(environment: Mapping[str, str]) -> str:
    """The node's name: what a variable says, as the downward API sets it, else the host's name."""
    return next((environment[name] for name in NODE_VARIABLES if environment.get(name)), socket.gethostname())


class _GivenIds(IdGenerator):
    """The ids of the next span are those that it was given."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id or RandomIdGenerator().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.span_id or RandomIdGenerator().generate_span_id()


class Sender:
    """Takes records of one worker and exports their spans; the caller never waits."""

    def __init__(self, guard: Guard, clock: Clock, rank: Rank, processor: SpanProcessor, totals: Totals) -> None:
        self.dropped = 0
        self._totals = totals
        self._guard = guard
        self._clock = clock
        self._rank = rank
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # which steps are traced is decided by their number, the same on all ranks
            resource=Resource.create(),
            id_generator=self._ids,
            span_limits=SpanLimits(max_links=MAX_LINKS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(names.ENGINE_SCOPE, __version__)
        self._records: queue.Queue[Record | None] = queue.Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None

    def send(self, record: Record) -> None:
        """Have the span of this step made."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="llmtrace-engine-steps", daemon=True)
            self._thread.start()
            Finalize(None, self.flush, exitpriority=0)  # atexit does not run in the forked processes of vLLM
        try:
            self._records.put_nowait(record)
        except queue.Full:
            if self.dropped == 0:
                logger.warning("llmtrace: spans of some steps are dropped: their queue is full")
            self.dropped += 1

    def flush(self) -> None:
        """Export what is queued, within FLUSH_S; called once, at the end of the process."""
        if self._thread is not None:
            deadline = time.monotonic() + FLUSH_S
            with contextlib.suppress(queue.Full):
                self._records.put(None, timeout=FLUSH_S)
                self._thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (record := self._records.get()) is not None:
            if self._guard.on:
                self._guard.run("making spans of steps", self._make, record)
        self._provider.force_flush()

    def _make(self, record: Record) -> None:
        deadline = time.monotonic() + MARKS_S
        while not self._clock.passed(record.end):
            if time.monotonic() > deadline:
                self.dropped += 1
                return
            time.sleep(PAUSE_S)
        batch = record.batch
        self._ids.trace_id = trace_id(batch.group, batch.number)
        self._ids.span_id = span_id(batch.group, batch.number, self._rank.world)
        links = [Link(context) for context in map(_context, batch.callers) if context is not None]
        found, lasted_ms = phases(record, self._clock), self._clock.ms(record.begin, record.end)
        span = self._tracer.start_span(
            names.STEP_SPAN,
            Context(),
            attributes=attributes(record, found, self._rank),
            links=links,
            start_time=record.start_ns,
        )
        span.end(record.start_ns + round(lasted_ms * _NS_PER_MS))
        if not batch.on_demand:  # the sums are of the sample, in which slow times have no more than their share
            self._totals.add(record, found, lasted_ms)


def attributes(record: Record, found: Phases | None, rank: Rank) -> dict[str, AttributeValue]:
    """What a step's span says."""
    batch = record.batch
    expert_tokens = None if record.expert_tokens is None else record.expert_tokens.tolist()
    told: dict[str, AttributeValue | None] = {
        names.STEP_GROUP: batch.group,
        names.STEP_NUMBER: batch.number,
        names.STEP_RANKS: rank.ranks,
        names.STEP_DUMMY: batch.dummy,
        names.STEP_REASON: names.REASON_ON_DEMAND if batch.on_demand else names.REASON_SAMPLED,
        names.STEP_PREFILL_REQUESTS: batch.prefill_requests,
        names.STEP_PREFILL_TOKENS: batch.prefill_tokens,
        names.STEP_DECODE_REQUESTS: batch.decode_requests,
        names.STEP_DECODE_TOKENS: batch.decode_tokens,
        names.STEP_KV_READ_TOKENS: batch.kv_read_tokens,
        names.STEP_WAITING_REQUESTS: batch.waiting_requests,
        names.STEP_WAITING_TOKENS: batch.waiting_tokens,
        names.STEP_UNLINKED_REQUESTS: batch.unlinked or None,
        names.STEP_PADDED_TOKENS: record.padded_tokens,
        names.DP_RANK: rank.dp,
        names.WORLD_RANK: rank.world,
        names.TP_RANK: rank.tp,
        names.EP_RANK: rank.ep,
        names.NODE: rank.node,
        names.ALL2ALL: rank.all2all,
        names.EXPERT_TOKENS: None if expert_tokens is None else expert_tokens[:_MOST_ATTRIBUTE_ITEMS],
    }
    if record.rearrangements:
        told |= {names.REARRANGEMENTS: record.rearrangements, names.REARRANGEMENT_TIME: record.rearrangement_ms}
    if found is not None:
        told |= {
            names.STEP_ATTENTION: found.attention,
            names.STEP_DISPATCH: found.dispatch,
            names.STEP_EXPERTS: found.experts,
            names.STEP_COMBINE: found.combine,
            names.STEP_WAIT: found.wait,
            names.SLOWEST_LAYER: found.layer,
            names.SLOWEST_LAYER_TIME: found.layer_ms,
        }
    return {name: value for name, value in told.items() if value is not None}


def _context(caller: str) -> SpanContext | None:
    """Of a ``traceparent`` header (W3C Trace Context)."""
    parts = caller.split("-")
    try:
        context = SpanContext(int(parts[1], 16), int(parts[2], 16), is_remote=True, trace_flags=TraceFlags(1))
    except (IndexError, ValueError):
        return None
    return context if context.is_valid else None


def exporter(endpoint: str, environment: Mapping[str, str]) -> Any:
    """The OTLP exporter that vLLM would make for this endpoint."""
    if environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc") == "http/protobuf":
        return importlib.import_module(f"{_EXPORTERS}.http.trace_exporter").OTLPSpanExporter(endpoint=endpoint)
    return importlib.import_module(f"{_EXPORTERS}.grpc.trace_exporter").OTLPSpanExporter(
        endpoint=endpoint, insecure=True
    )
