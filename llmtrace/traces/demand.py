"""What a request was at the gateway, moment by moment, and which of the metrics that scalers look at it was part of.

A scaler sees numbers; which requests they were made of follows from the requests' traces. A request is in
``flow_control_queue_size`` from its arrival until it may be scheduled, in ``request_running`` from then on, and its
prompt in ``inflight_tokens`` from then until its first token. Of numbers that no request is part of at a moment, such
as a quantile of latencies, none can be told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes, Span, Trace

_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_MODEL = re.compile(r'(?:target_)?model_name\s*=\s*"((?:[^"\\]|\\.)*)"')


class Stay(NamedTuple):
    """A request at the gateway. Times in nanoseconds since the epoch.

    It waited from ``arrived_ns`` to ``dispatched_ns``, gave its first token at ``first_token_ns`` and ran until
    ``ended_ns``; what never came is as late as what came after it. ``tokens`` are those of prompt and answer,
    ``prompt_tokens`` those of its prompt that were in no cache. ``span_id`` is that of ``gateway.request``.
    """

    trace_id: str
    span_id: str
    model: str
    arrived_ns: int
    dispatched_ns: int
    first_token_ns: int
    ended_ns: int
    tokens: int
    prompt_tokens: int


def stay(trace: Trace) -> Stay | None:
    """The request of a trace at the gateway; None where the trace has none.

    Where the picker traces its queue, that span tells the wait; else, as with llm-d's own, it is the time from the
    start of the orchestration to the first scheduling profile. Tokens and the first token are the gateway's, else the
    first model server's.
    """
    # The first of each name: there may be millions of traces.
    first = {span.name: span for span in reversed(trace.spans)}
    gateway, orchestration = first.get(a.GATEWAY_SPAN), first.get(a.ORCHESTRATION_SPAN)
    if gateway is None or orchestration is None:
        return None
    queue, profile, server = first.get(a.FLOW_SPAN), first.get(a.PROFILE_SPAN), first.get(a.SERVER_SPAN)
    model = orchestration.attributes.get(a.TARGET_MODEL) or orchestration.attributes.get(a.REQUEST_MODEL)
    arrived = queue.start_ns if queue else orchestration.start_ns
    dispatched = profile.start_ns if profile else gateway.end_ns
    if queue and profile:
        dispatched = queue.end_ns
    ended = max(gateway.end_ns, dispatched)
    prompt, cached, answered = _tokens(gateway.attributes, server)
    return Stay(
        trace.trace_id,
        gateway.span_id,
        model if isinstance(model, str) else "",
        arrived,
        dispatched,
        min(max(_first_token(gateway, server, ended), dispatched), ended),
        ended,
        prompt + answered,
        max(prompt - cached, 0),
    )


def _tokens(told: Attributes, server: Span | None) -> tuple[int, int, int]:
    """Tokens of the prompt, those of them that were cached, and of the answer; 0 for what nobody tells."""
    prompt, cached, answered = told.get(a.INPUT_TOKENS), told.get(a.CACHED_TOKENS), told.get(a.OUTPUT_TOKENS)
    if prompt is None and server is not None:
        prompt, answered = server.attributes.get(a.VLLM_PROMPT_TOKENS), server.attributes.get(a.VLLM_COMPLETION_TOKENS)
    return (
        int(prompt) if isinstance(prompt, int | float) else 0,
        int(cached) if isinstance(cached, int | float) else 0,
        int(answered) if isinstance(answered, int | float) else 0,
    )


def _first_token(gateway: Span, server: Span | None, otherwise: int) -> int:
    waited_ms = gateway.attributes.get(a.GATEWAY_TTFT)
    if isinstance(waited_ms, int | float):
        return gateway.start_ns + int(waited_ms * 1e6)
    waited_s = server.attributes.get(a.VLLM_TTFT) if server else None
    return server.start_ns + int(waited_s * 1e9) if server and isinstance(waited_s, int | float) else otherwise


class Part(StrEnum):
    """The part of a request's stay in which it is in a metric."""

    WAITING = "waiting"
    RUNNING = "running"
    PREFILLING = "prefilling"


class Unit(StrEnum):
    """What a metric is a sum of: requests, so that its value is their number; their prompts' tokens; or a measure of
    load that requests cause, and that is no sum over them."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    LOAD = "load"


_METRICS = (
    (re.compile(r"(llm_d_(router_)?epp|inference_extension)_flow_control_queue_size"), Part.WAITING, Unit.REQUESTS),
    (re.compile(r"(llm_d_(router_)?epp|inference_extension)_flow_control_queue_bytes"), Part.WAITING, Unit.LOAD),
    (re.compile(r"llm_d_(router_)?epp_inflight_tokens"), Part.PREFILLING, Unit.TOKENS),
    (re.compile(r"llm_d_(router_)?epp_(request_running|inflight_requests)"), Part.RUNNING, Unit.REQUESTS),
    (re.compile(r"inference_(model|objective)_running_requests"), Part.RUNNING, Unit.REQUESTS),
    (
        re.compile(r"(llm_d_(router_)?epp|inference_extension)_flow_control_pool_saturation"),
        Part.RUNNING,
        Unit.LOAD,
    ),
    (
        re.compile(r"vllm:(num_requests_(running|waiting)|kv_cache_usage_perc|gpu_cache_usage_perc)"),
        Part.RUNNING,
        Unit.LOAD,
    ),
)
"""By name; where a query has several, the first of these that it has is what it is about."""


@dataclass(frozen=True)
class Demand:
    """The requests that are in a query's value: in which part of their stay, and of which model (None: of any).

    With ``part`` None nobody can tell: it is *not attributable*.
    """

    part: Part | None
    model: str | None = None
    unit: Unit = Unit.REQUESTS

    def interval(self, found: Stay) -> tuple[int, int]:
        """When the request is counted, as far as its model is."""
        if self.part is Part.WAITING:
            return found.arrived_ns, found.dispatched_ns
        if self.part is Part.PREFILLING:
            return found.dispatched_ns, found.first_token_ns
        return found.dispatched_ns, found.ended_ns

    def weight(self, found: Stay) -> int:
        """How much of the value is the request's, in relation to others': its tokens, or how long it is in it."""
        start, end = self.interval(found)
        return found.prompt_tokens if self.unit is Unit.TOKENS else end - start

    def counts(self, found: Stay, since_ns: int, until_ns: int) -> bool:
        """Whether the request was in the value at some time from ``since_ns`` to ``until_ns``."""
        if self.part is None or self.model not in (None, found.model):
            return False
        start, end = self.interval(found)
        return start < until_ns and end > since_ns and end > start


@lru_cache(1024)
def demand(query: str) -> Demand:
    """The requests that are in a PromQL query's value, by the metrics that it names."""
    names = _NAME.findall(query)
    for pattern, part, unit in _METRICS:
        if any(pattern.fullmatch(name) for name in names):
            model = _MODEL.search(query)
            return Demand(part, model[1].replace('\\"', '"').replace("\\\\", "\\") if model else None, unit)
    return Demand(None)
