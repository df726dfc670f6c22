"""What the traces of a run say about each request: tokens, latencies, who served it, how it was routed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes, AttributeValue, Span, Trace

USUAL_KV_BLOCK_SIZE = 16
"""Tokens; vLLM's default on GPUs."""


@dataclass(frozen=True)
class Scorer:
    """One scorer's verdict: its weight, and its unweighted score of each endpoint.

    llm-d's picker tells only the ``best`` score and the ``mean``.
    """

    type: str
    weight: float
    scores: dict[str, float]
    best: float | None = None
    mean: float | None = None


@dataclass(frozen=True)
class Decision:
    """A routing decision as the picker's spans tell it.

    ``totals`` are weighted score sums; ``match_tokens`` are the prompt tokens that the picker believed to be
    cached on each endpoint, out of ``prompt_tokens``, both in the picker's own estimate. None where the
    picker does not tell.
    """

    time_ns: int
    scorers: tuple[Scorer, ...] = ()
    totals: dict[str, float] = field(default_factory=dict)
    match_tokens: dict[str, int] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Served:
    """One measured request. Latencies in milliseconds; None where the trace does not tell."""

    trace_id: str
    arm: str
    block: int
    pair_id: str
    tenant: str
    conversation: str
    turn: int
    start_ns: int
    failed: bool
    ttft_ms: float | None
    e2e_ms: float | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    endpoint: str | None
    gateway_ttft_ms: float | None = None
    gateway_input_tokens: int | None = None
    gateway_cached_tokens: int | None = None
    server_ttft_ms: float | None = None
    server_prompt_tokens: int | None = None
    decision: Decision | None = None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_ms is None or self.e2e_ms is None or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.e2e_ms - self.ttft_ms) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Block:
    """One arm's share of a block, and what vLLM's own counters said about it, by server.

    ``hits`` and ``queries`` have the same servers. ``roles`` are those of the servers, as far as they are told;
    ``attributes`` are all of the block's span.
    """

    arm: str
    block: int
    requests: int
    hits: dict[str, int]
    queries: dict[str, int]
    kv_block_size: int | None
    model: str
    roles: dict[str, str] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)


def integer(value: AttributeValue) -> int | None:
    """The value as an integer, or None when it is no number."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def number(value: AttributeValue) -> float | None:
    """The value as a float, or None when it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text(value: AttributeValue) -> str:
    """The value if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def items(value: AttributeValue) -> Sequence[AttributeValue]:
    """The elements of an array value, none of any other."""
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def strings(value: AttributeValue) -> list[str]:
    """The strings of an array value."""
    return [v for v in items(value) if isinstance(v, str)]


def short_name(endpoint: str) -> str:
    """An endpoint's name without its namespace: default/vllm-0 becomes vllm-0."""
    return endpoint.rpartition("/")[2]


def read_blocks(traces: Iterable[Trace]) -> list[Block]:
    """The blocks of a run, from the driver's own spans."""
    blocks = []
    for span in (s for trace in traces for s in trace.named(a.BLOCK_SPAN)):
        servers = strings(span.attributes.get(a.BLOCK_SERVERS))
        hits = [integer(v) or 0 for v in items(span.attributes.get(a.BLOCK_HITS))]
        queries = [integer(v) or 0 for v in items(span.attributes.get(a.BLOCK_QUERIES))]
        blocks.append(
            Block(
                arm=text(span.attributes.get(a.ARM)),
                block=integer(span.attributes.get(a.BLOCK)) or 0,
                requests=integer(span.attributes.get(a.BLOCK_REQUESTS)) or 0,
                # Of a server that lacks one of the two, neither is used.
                hits={server: hit for server, hit, _ in zip(servers, hits, queries, strict=False)},
                queries={server: query for server, _, query in zip(servers, hits, queries, strict=False)},
                kv_block_size=integer(span.attributes.get(a.KV_BLOCK_SIZE)),
                model=text(span.attributes.get(a.REQUEST_MODEL)),
                roles=dict(zip(servers, strings(span.attributes.get(a.BLOCK_ROLES)), strict=False)),
                attributes=span.attributes,
            )
        )
    return sorted(blocks, key=lambda b: (b.block, b.arm))


def kv_block_size_of(blocks: Iterable[Block]) -> tuple[int, list[str]]:
    """Tokens in a KV block of the servers, and a note for people where the traces do not tell."""
    told = next((b.kv_block_size for b in blocks if b.kv_block_size), None)
    if told is not None:
        return told, []
    return USUAL_KV_BLOCK_SIZE, [
        f"the traces do not tell the KV block size; vLLM's usual {USUAL_KV_BLOCK_SIZE} tokens are assumed"
    ]


def read_requests(traces: Iterable[Trace]) -> list[Served]:
    """The measured requests of a run in order of time; warm-up requests and other traces are left out."""
    served = [s for trace in traces if (s := read_request(trace)) is not None]
    names = {
        address: short_name(name)
        for trace in traces
        for span in trace.named(a.GATEWAY_SPAN)
        if (address := text(span.attributes.get(a.ENDPOINT))) and (name := text(span.attributes.get(a.ENDPOINT_NAME)))
    }
    renamed = [replace(s, endpoint=names.get(s.endpoint, s.endpoint)) if s.endpoint else s for s in served]
    return sorted(renamed, key=lambda s: s.start_ns)


def read_request(trace: Trace) -> Served | None:
    """The request of one trace; None where it is not a measured request's."""
    client = next((s for s in trace.spans if s.service == a.CLIENT_SERVICE and text(s.attributes.get(a.PAIR_ID))), None)
    if client is None or client.attributes.get(a.WARMUP):
        return None
    gateway = next(iter(trace.named(a.GATEWAY_SPAN)), None)
    # Of several model servers the last one gave the answer; one before it prefilled.
    server = next((s for s in reversed(trace.named(a.SERVER_SPAN)) if s.service != a.CLIENT_SERVICE), None)
    latency = number(server.attributes.get(a.VLLM_TTFT)) if server else None
    of_client, of_gateway = client.attributes, gateway.attributes if gateway else {}
    return Served(
        trace_id=trace.trace_id,
        arm=text(of_client.get(a.ARM)),
        block=integer(of_client.get(a.BLOCK)) or 0,
        pair_id=text(of_client.get(a.PAIR_ID)),
        tenant=text(of_client.get(a.TENANT)),
        conversation=text(of_client.get(a.CONVERSATION)),
        turn=integer(of_client.get(a.TURN)) or 0,
        start_ns=client.start_ns,
        failed=client.status == "ERROR",
        ttft_ms=number(of_client.get(a.CLIENT_TTFT)),
        e2e_ms=number(of_client.get(a.CLIENT_E2E)),
        input_tokens=integer(of_client.get(a.INPUT_TOKENS)),
        output_tokens=integer(of_client.get(a.OUTPUT_TOKENS)),
        cached_tokens=integer(of_client.get(a.CACHED_TOKENS)),
        endpoint=_endpoint(gateway, server),
        gateway_ttft_ms=number(of_gateway.get(a.GATEWAY_TTFT)),
        gateway_input_tokens=integer(of_gateway.get(a.INPUT_TOKENS)),
        gateway_cached_tokens=integer(of_gateway.get(a.CACHED_TOKENS)),
        server_ttft_ms=latency * 1e3 if latency is not None else None,
        server_prompt_tokens=integer(server.attributes.get(a.VLLM_PROMPT_TOKENS)) if server else None,
        decision=_decision(trace),
    )


def _endpoint(gateway: Span | None, server: Span | None) -> str | None:
    """Who really served the request, else whom the picker chose.

    llm-d's pick_endpoints is no help: its top_endpoints are the best scored ones, not the one that was
    picked.
    """
    if server is not None and server.instance:
        return server.instance
    if gateway is None:
        return None
    name = text(gateway.attributes.get(a.ENDPOINT_NAME))
    return short_name(name) if name else text(gateway.attributes.get(a.ENDPOINT)) or None


def _decision(trace: Trace) -> Decision | None:
    profile = next(iter(trace.named(a.PROFILE_SPAN)), None)
    if profile is None:
        return None
    scorers, match, estimate = [], None, None
    for span in trace.spans:
        # Where requests are split, another profile with scorers of its own follows.
        if not span.name.startswith(a.SCORER_SPAN_PREFIX) or not _within(trace, span, profile):
            continue
        endpoints = [short_name(e) for e in strings(span.attributes.get(a.SCORER_ENDPOINTS))]
        scores = [number(v) or 0.0 for v in items(span.attributes.get(a.SCORER_SCORES))]
        weight = number(span.attributes.get(a.SCORER_WEIGHT))
        scorers.append(
            Scorer(
                type=text(span.attributes.get(a.SCORER_TYPE)) or span.name.removeprefix(a.SCORER_SPAN_PREFIX),
                weight=1.0 if weight is None else weight,
                scores=dict(zip(endpoints, scores, strict=False)),
                best=number(span.attributes.get(a.SCORER_MAX)),
                mean=number(span.attributes.get(a.SCORER_AVG)),
            )
        )
        if tokens := items(span.attributes.get(a.MATCH_TOKENS)):
            match = dict(zip(endpoints, (integer(t) or 0 for t in tokens), strict=False))
            estimate = integer(span.attributes.get(a.ESTIMATED_PROMPT_TOKENS))
    return Decision(profile.start_ns, tuple(scorers), _totals(trace, scorers), match, estimate)


def _within(trace: Trace, span: Span, ancestor: Span) -> bool:
    return any(above is ancestor for above in trace.ancestors(span))


def _totals(trace: Trace, scorers: Sequence[Scorer]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for scorer in scorers:
        for endpoint, score in scorer.scores.items():
            totals[endpoint] = totals.get(endpoint, 0.0) + scorer.weight * score
    if totals:
        return totals
    pick = next(iter(trace.named(a.PICK_SPAN)), None)
    if pick is None:
        return {}
    best = [short_name(e) for e in strings(pick.attributes.get(a.TOP_ENDPOINTS))]
    return dict(zip(best, (number(v) or 0.0 for v in items(pick.attributes.get(a.TOP_SCORES))), strict=False))
