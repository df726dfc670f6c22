"""From a request's facts to the spans below its ``llm_request``.

The spans tile the request: ``queue``, ``kv_load``, ``prefill`` and ``decode`` never overlap, so that their times add
up. vLLM counts waiting for remote KV as time in queue; here that time is ``kv_load`` and nothing else, and what a
request waits after its KV has come is a second ``queue`` with its own reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from llmtrace.engine.clock import NS_PER_S, wall_ns
from llmtrace.engine.facts import ABORTED, FAILED, Facts, Load
from llmtrace.engine.steps.ids import span_id, trace_id
from llmtrace.semconv import attributes as names

_MS_PER_S = 1000.0

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened during a span; ns since the epoch."""

    name: str
    time_ns: int
    attributes: Attributes = field(default_factory=dict)


@dataclass(slots=True)
class Phase:
    """A span to be: [start, end) in ns since the epoch."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Attributes = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    failed: bool = False
    steps: list[SpanContext] = field(default_factory=list)
    """The engine's traced steps that it was part of."""


@dataclass(frozen=True, slots=True)
class Window:
    """The life of ``llm_request``, ns since the epoch: its children must lie inside.

    It is measured in another process and ends when the output has been handled, so that only the clocks' own error is
    ever cut off.
    """

    start_ns: int
    end_ns: int


def phases(facts: Facts, request_id: str, window: Window | None = None) -> list[Phase]:
    """The spans of a request, in order, without overlap."""
    times = _Times(facts, window)
    common = _common(facts, request_id)
    found = _before_admission(facts, times)
    if times.scheduled is not None:
        end = times.end if times.first_token is None else times.first_token
        steps = _steps(facts, facts.prefill_steps, facts.prefill_on_demand)
        found.append(Phase(names.PREFILL_SPAN, times.scheduled, end, _prefill_attributes(facts), steps=steps))
    if times.first_token is not None and (facts.output_tokens > 1 or facts.finish_reason in (ABORTED, FAILED)):
        steps = _steps(facts, facts.decode_steps, facts.decode_on_demand)
        found.append(Phase(names.DECODE_SPAN, times.first_token, times.end, _decode_attributes(facts), steps=steps))
    for phase in found:
        phase.attributes = common | phase.attributes
    last = found[-1]
    last.attributes |= outcome(facts)
    last.failed = facts.finish_reason == FAILED
    for event in _events(facts, times):
        _holder(found, event).events.append(event)
    return found


def outcome(facts: Facts) -> Attributes:
    """How a request ended and what it held, for its last span."""
    attributes: Attributes = {names.FINISH_REASONS: (facts.finish_reason,)}
    if facts.kv_blocks is not None:
        attributes[names.KV_CACHE_BLOCKS] = facts.kv_blocks
    if facts.preemptions:
        away = sum((item.resumed or facts.finished) - item.preempted for item in facts.preemptions)
        attributes[names.PREEMPTIONS] = len(facts.preemptions)
        attributes[names.PREEMPTED_TIME] = max(away, 0.0) * _MS_PER_S
    return attributes


def write(tracer: Tracer, parent: SpanContext, found: list[Phase]) -> None:
    """Make the spans, finished, below ``parent``."""
    context = set_span_in_context(NonRecordingSpan(parent))
    for phase in found:
        links = [Link(step) for step in phase.steps]
        span = tracer.start_span(
            phase.name, context, attributes=phase.attributes, links=links, start_time=phase.start_ns
        )
        for event in phase.events:
            span.add_event(event.name, event.attributes, event.time_ns)
        if phase.failed:
            span.set_status(Status(StatusCode.ERROR, "the engine failed the request"))
        span.end(phase.end_ns)


def write_aborted(tracer: Tracer, parent: SpanContext, facts: Facts, request_id: str) -> None:
    """Make ``llm_request``, which vLLM leaves out for a request that is aborted, and the spans below it.

    Attributes, as far as they are known, are named as vLLM names them; latency in seconds.
    """
    end = wall_ns(facts.finished, facts.offset_ns)
    start = min(facts.arrival_ns or wall_ns(facts.queued, facts.offset_ns), end)
    attributes: Attributes = {
        **_common(facts, request_id),
        **outcome(facts),
        names.VLLM_PROMPT_TOKENS: facts.prompt_tokens,
        names.VLLM_COMPLETION_TOKENS: facts.output_tokens,
        names.VLLM_E2E: (end - start) / NS_PER_S,
    }
    context = set_span_in_context(NonRecordingSpan(parent))
    span = tracer.start_span(names.SERVER_SPAN, context, kind=SpanKind.SERVER, attributes=attributes, start_time=start)
    span.add_event(names.ABORT_EVENT, timestamp=end)
    if span.is_recording():
        write(tracer, span.get_span_context(), phases(facts, request_id, Window(start, end)))
    span.end(end)


class _Times:
    """A request's moments on the wall clock, each at or after the one before it and inside the window."""

    def __init__(self, facts: Facts, window: Window | None) -> None:
        self._offset = facts.offset_ns
        self._low = window.start_ns if window else None
        self._high = window.end_ns if window else None
        self.queued = self.wall(facts.queued)
        ended = facts.finished
        if facts.finish_reason not in (ABORTED, FAILED) and facts.last_token is not None:
            ended = facts.last_token
        self.end = max(self.wall(ended), self.queued)
        self.scheduled = self._between(facts.scheduled, self.queued)
        self.first_token = None if self.scheduled is None else self._between(facts.first_token, self.scheduled)
        self.admitted = self.end if self.scheduled is None else self.scheduled

    def wall(self, moment: float) -> int:
        """``moment`` (monotonic s) inside the window, ns since the epoch."""
        time = wall_ns(moment, self._offset)
        if self._high is not None:
            time = min(time, self._high)
        return time if self._low is None else max(time, self._low)

    def _between(self, moment: float | None, low: int) -> int | None:
        return None if moment is None else min(max(self.wall(moment), low), self.end)


def _before_admission(facts: Facts, times: _Times) -> list[Phase]:
    """Waiting and loading, alternately: ``queue``, and for each load ``kv_load`` and, if it then waits, ``queue``."""
    arrived: Attributes = {names.QUEUE_REASON: names.QUEUE_REASON_ADMISSION}
    if facts.position is not None:
        arrived[names.QUEUE_POSITION] = facts.position
    found: list[Phase] = []
    cursor, attributes = times.queued, arrived
    for load in facts.loads:
        start = min(max(times.wall(load.start), cursor), times.admitted)
        end = times.admitted if load.end is None else min(max(times.wall(load.end), start), times.admitted)
        if not found or start > cursor:
            found.append(Phase(names.QUEUE_SPAN, cursor, start, attributes))
        found.append(Phase(names.KV_LOAD_SPAN, start, end, _load_attributes(facts, load)))
        cursor, attributes = end, {names.QUEUE_REASON: names.QUEUE_REASON_KV_LOADED}
    if not found or times.admitted > cursor:
        found.append(Phase(names.QUEUE_SPAN, cursor, times.admitted, attributes))
    queues = [phase for phase in found if phase.name == names.QUEUE_SPAN]
    queues[-1].attributes = queues[-1].attributes | _admission_attributes(facts)
    return found


def _holder(found: list[Phase], event: Event) -> Phase:
    """The span during which something happened; at a border, the earlier one for what ends it."""
    if event.name == names.FIRST_TOKEN:
        return next(phase for phase in found if phase.name == names.PREFILL_SPAN)
    if event.name == names.ABORT_EVENT:
        return found[-1]
    for phase in reversed(found):
        if phase.start_ns <= event.time_ns:
            return phase
    return found[0]


def _events(facts: Facts, times: _Times) -> list[Event]:
    found: list[Event] = []
    for item in facts.preemptions:
        found.append(Event(names.PREEMPTED_EVENT, times.wall(item.preempted)))
        if item.resumed is not None:
            found.append(Event(names.RESUMED_EVENT, times.wall(item.resumed)))
    for time, tokens, requests, others in facts.chunks:
        attributes: Attributes = {
            names.CHUNK_TOKENS: tokens,
            names.CHUNK_BATCH_REQUESTS: requests,
            names.CHUNK_BATCH_TOKENS: others,
        }
        found.append(Event(names.CHUNK_EVENT, times.wall(time), attributes))
    if times.first_token is not None:
        found.append(Event(names.FIRST_TOKEN, times.first_token))
    if facts.finish_reason == ABORTED:
        found.append(Event(names.ABORT_EVENT, times.end))
    return sorted(found, key=lambda event: event.time_ns)


def _common(facts: Facts, request_id: str) -> Attributes:
    attributes: Attributes = {
        names.REQUEST_ID: request_id,
        names.ENGINE_ID: facts.engine_id,
        names.DP_RANK: facts.dp_rank,
    }
    if facts.lora is not None:
        attributes[names.LORA] = facts.lora
    if facts.structured_output:
        attributes[names.STRUCTURED_OUTPUT] = True
    return attributes


def _admission_attributes(facts: Facts) -> Attributes:
    pairs = (
        (names.QUEUE_RUNNING, facts.running),
        (names.QUEUE_WAITING, facts.waiting),
        (names.KV_CACHE_USAGE, facts.kv_usage),
    )
    return {name: value for name, value in pairs if value is not None}


def _load_attributes(facts: Facts, load: Load) -> Attributes:
    attributes: Attributes = {names.KV_LOAD_TOKENS: load.tokens, names.KV_LOAD_FAILED: load.failed}
    pairs = (
        (names.KV_LOAD_REMOTE_ENGINE, facts.remote_engine_id),
        (names.KV_LOAD_BLOCKS, load.blocks),
        (names.KV_LOAD_BYTES, load.size),
        (names.KV_LOAD_TRANSFER_TIME, None if load.transfer is None else load.transfer * _MS_PER_S),
    )
    return attributes | {name: value for name, value in pairs if value is not None}


def _prefill_attributes(facts: Facts) -> Attributes:
    attributes: Attributes = {names.INPUT_TOKENS: facts.prompt_tokens, names.PREFILL_CHUNKS: facts.chunk_count}
    local, external = facts.local_cached_tokens, facts.external_cached_tokens
    pairs = (
        (names.COMPUTED_TOKENS, facts.computed_tokens),
        (names.LOCAL_CACHED_TOKENS, local),
        (names.EXTERNAL_CACHED_TOKENS, external),
        (names.CACHED_TOKENS, None if local is None or external is None else local + external),
    )
    return attributes | {name: value for name, value in pairs if value is not None}


def _steps(facts: Facts, sampled: list[int], on_demand: list[int]) -> list[SpanContext]:
    """The spans of its engine's rank in these steps; those of the other ranks are in the same traces."""
    group, rank = facts.step_group, facts.step_rank
    return [
        SpanContext(
            trace_id(group, n), span_id(group, n, rank), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        for n in sorted([*sampled, *on_demand])
    ]


def _decode_attributes(facts: Facts) -> Attributes:
    attributes: Attributes = {names.OUTPUT_TOKENS: facts.output_tokens}
    if facts.output_tokens > 1 and facts.first_token is not None and facts.last_token is not None:
        mean = (facts.last_token - facts.first_token) / (facts.output_tokens - 1)
        attributes[names.TPOT_MEAN] = mean * _MS_PER_S
        attributes[names.TOKEN_GAP_MAX] = facts.worst_gap * _MS_PER_S
    if facts.draft_tokens:
        attributes[names.DRAFT_TOKENS] = facts.draft_tokens
        attributes[names.ACCEPTED_TOKENS] = facts.accepted_tokens
        attributes[names.ACCEPTANCE_RATE] = facts.accepted_tokens / facts.draft_tokens
    return attributes
