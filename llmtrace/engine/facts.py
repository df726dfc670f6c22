"""What the engine core knows about one request, and how it travels to the process that makes the spans.

The scheduler runs in the engine core process; vLLM makes ``llm_request`` in the API server's. Between them go
``EngineCoreOutput`` messages, whose fields are fixed by position; but ``trace_headers`` is a mapping of strings that
vLLM echoes untouched and reads only ``traceparent`` and ``tracestate`` from. The facts ride there as one more key, once
per request, on its last output: no channel of our own, no wire format changed, and an API server without this plugin
does not notice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

FACTS_HEADER = "llmtrace-facts"
"""Key in ``trace_headers`` of the last output."""
DEPARTED_HEADER = "llmtrace-departed"
"""Present where the output was added by this plugin, for a request that left without one (abort)."""
MAX_CHUNKS = 64
"""Chunks kept per request; OpenTelemetry keeps 128 events per span."""
MAX_STEPS = 64
"""Traced engine steps kept per request and phase, and as many on demand: OpenTelemetry keeps 128 links per span."""
ABORTED, FAILED = "abort", "error"
"""Two of vLLM's finish reasons."""
_WIRE_VERSION = 3
_SAMPLED = 1
_WANTED = "llmtrace=steps"

Chunk = tuple[float, int, int, int]
"""Time (monotonic s), tokens of this request, other requests in the batch, their tokens."""


@dataclass(slots=True)
class Load:
    """One transfer of remote KV, as the scheduler saw it. Times in monotonic seconds.

    The end is when the scheduler was told, once per step, not when the last byte came.
    """

    start: float
    end: float | None = None
    tokens: int = 0
    failed: bool = False
    blocks: int | None = None
    """KV cache blocks to fill, over all KV cache groups."""
    size: int | None = None
    """Bytes of those blocks, over all workers of the engine."""
    transfer: float | None = None
    """The connector's own time for it, s, where it can be told from those of other requests."""


@dataclass(slots=True)
class Preemption:
    """Out of the batch and back, monotonic seconds; no ``resumed`` if it ended first."""

    preempted: float
    resumed: float | None = None


@dataclass(slots=True)
class Facts:
    """One request in one engine. Times in seconds of the engine core's ``time.monotonic()`` unless said otherwise.

    No token ids, no text.
    """

    queued: float
    arrival_ns: int = 0
    """When the API server took the request, ns since the epoch (``Request.arrival_time``)."""
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float = 0.0
    offset_ns: int = 0
    """From the monotonic to the wall clock, see :mod:`llmtrace.engine.clock`."""
    finish_reason: str = ""
    engine_id: str = ""
    dp_rank: int = 0
    lora: str | None = None
    structured_output: bool = False
    position: int | None = None
    """Requests waiting when this one joined the queue: its place, counted from 0, if first come is first served."""
    running: int | None = None
    waiting: int | None = None
    """Requests running (this one included) and waiting right after it was scheduled."""
    kv_usage: float | None = None
    """Share of the KV cache in use right after it was scheduled, 0 to 1."""
    prompt_tokens: int = 0
    computed_tokens: int | None = None
    local_cached_tokens: int | None = None
    external_cached_tokens: int | None = None
    chunks: list[Chunk] = field(default_factory=list)
    chunk_count: int = 0
    loads: list[Load] = field(default_factory=list)
    remote_engine_id: str | None = None
    preemptions: list[Preemption] = field(default_factory=list)
    output_tokens: int = 0
    worst_gap: float = 0.0
    """Longest time between two outputs, s; a preemption counts, because the user waited."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    kv_blocks: int | None = None
    """Blocks that held its tokens when it ended, per KV cache group."""
    step_group: str = ""
    """Of the traced steps that had it in their batch, see :mod:`llmtrace.engine.steps`; empty where there are none."""
    step_rank: int = 0
    """Of its engine's first worker in that group."""
    prefill_steps: list[int] = field(default_factory=list)
    decode_steps: list[int] = field(default_factory=list)
    """Numbers of those steps, of the sample of one in so many."""
    prefill_on_demand: list[int] = field(default_factory=list)
    decode_on_demand: list[int] = field(default_factory=list)
    """And of those that were traced for a slow request."""


_NAMES = tuple(item.name for item in fields(Facts))
_LOADS, _PREEMPTIONS = _NAMES.index("loads"), _NAMES.index("preemptions")


def to_wire(facts: Facts) -> str:
    """The facts as one string of JSON, by position."""
    values: list[Any] = [getattr(facts, name) for name in _NAMES]
    values[_LOADS] = [astuple(load) for load in facts.loads]
    values[_PREEMPTIONS] = [astuple(item) for item in facts.preemptions]
    return json.dumps([_WIRE_VERSION, *values], separators=(",", ":"))


def from_wire(text: str) -> Facts | None:
    """The facts of :func:`to_wire`; None if they come from another version of this plugin."""
    version, *values = json.loads(text)
    if version != _WIRE_VERSION or len(values) != len(_NAMES):
        return None
    values[_LOADS] = [Load(*item) for item in values[_LOADS]]
    values[_PREEMPTIONS] = [Preemption(*item) for item in values[_PREEMPTIONS]]
    facts = Facts(*values)
    facts.chunks = [(time, tokens, requests, others) for time, tokens, requests, others in facts.chunks]
    return facts


def is_sampled(headers: Mapping[str, str] | None) -> bool:
    """Whether the caller's ``traceparent`` (W3C Trace Context) says that this request is sampled."""
    if not headers:
        return False
    parts = headers.get("traceparent", "").split("-")
    if len(parts) < 4:
        return False
    try:
        return bool(int(parts[3], 16) & _SAMPLED)
    except ValueError:
        return False


def asks_for_steps(headers: Mapping[str, str]) -> bool:
    """Whether the caller's ``tracestate`` (W3C Trace Context) wants the engine's steps traced for this request."""
    return any(member.strip() == _WANTED for member in headers.get("tracestate", "").split(","))
