"""Traces as the stack makes them, for tests: one request each, and whole runs."""

from __future__ import annotations

from dataclasses import replace

from llmtrace.traces.model import Attributes, Span, Trace

MS = 1_000_000
T0 = 1_800_000_000_000 * MS
SERVERS = ("vllm-0", "vllm-1", "vllm-2")
INGRESS = {
    "component": "proxy",
    "node_id": "gateway",
    "zone": "",
    "guid:x-request-id": "r-1",
    "http.url": "http://127.0.0.1:18080/v1/chat/completions",
    "http.method": "POST",
    "http.protocol": "HTTP/1.1",
    "http.status_code": "200",
    "downstream_cluster": "-",
    "user_agent": "-",
    "peer.address": "127.0.0.1",
    "request_size": "6725",
    "response_size": "2612",
    "response_flags": "-",
    "upstream_cluster": "model-servers",
    "upstream_cluster.name": "model-servers",
}
SCORERS = (("prefix-cache-scorer", 2.0), ("queue-scorer", 1.0), ("kv-cache-utilization-scorer", 1.0))


def span(
    trace_id: str,
    number: int,
    parent: int | None,
    name: str,
    service: str,
    start_ms: float,
    end_ms: float,
    *,
    kind: str = "INTERNAL",
    instance: str = "",
    origin_ns: int = T0,
    **attributes: object,
) -> Span:
    resource: dict[str, str] = {"service.name": service} | ({"service.instance.id": instance} if instance else {})
    return Span(
        trace_id=trace_id,
        span_id=f"{number:016x}",
        parent_id=None if parent is None else f"{parent:016x}",
        name=name,
        kind=kind,
        start_ns=origin_ns + int(start_ms * MS),
        end_ns=origin_ns + int(end_ms * MS),
        attributes={k.replace("__", "."): v for k, v in attributes.items()},  # type: ignore[misc]
        resource=resource,
    )


def request_trace(
    number: int = 1,
    *,
    arm: str = "prefix-aware",
    pair_id: str = "harbour-0-0-0",
    tenant: str = "harbour",
    conversation: str = "harbour-0-0",
    turn: int = 0,
    block: int = 0,
    start_ms: float = 0.0,
    ttft_ms: float = 100.0,
    prompt: int = 1500,
    cached: int = 0,
    endpoint: str = "vllm-0",
    match: tuple[int, int, int] | None = (0, 0, 0),
    scores: dict[str, tuple[float, float, float]] | None = None,
    upstream: bool = False,
    run_id: str = "run-1",
) -> Trace:
    """One good trace; ``upstream`` gives llm-d's shape: vLLM under the caller, no llmtrace.* spans."""
    trace_id = f"{number:032x}"
    end = ttft_ms + 350
    names = [f"default/{s}" for s in SERVERS]
    per_scorer = scores or {name: (1.0, 1.0, 1.0) for name, _ in SCORERS}

    def make(n: int, parent: int | None, name: str, service: str, a: float, b: float, **more: object) -> Span:
        origin = T0 + int(start_ms * MS)
        return span(trace_id, n, parent, name, service, a, b, origin_ns=origin, **more)  # type: ignore[arg-type]

    usage: dict[str, object] = {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": cached,
    }
    client: dict[str, object] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smol",
        **usage,
        "llmtrace.client.ttft_ms": ttft_ms,
        "llmtrace.client.e2e_ms": end,
        "llmtrace.scenario.name": "prefix-cache",
        "llmtrace.scenario.run_id": run_id,
        "llmtrace.scenario.arm": arm,
        "llmtrace.scenario.pair_id": pair_id,
        "llmtrace.scenario.block": block,
        "llmtrace.tenant": tenant,
        "llmtrace.conversation": conversation,
        "llmtrace.turn": turn,
    }
    gateway: dict[str, object] = (
        {}
        if upstream
        else {
            "llmtrace.endpoint.address": f"127.0.0.1:1810{SERVERS.index(endpoint)}",
            "llmtrace.endpoint.name": f"default/{endpoint}",
            "llmtrace.gateway.ttft_ms": ttft_ms - 3,
            **usage,
        }
    )
    epp = "llm-d-epp"
    about = {"gen_ai.request.id": "r-1", "gen_ai.request.model": "smol"}
    gateway["gen_ai.request.id"] = "r-1"
    filtered = {"llm_d.epp.filter.candidate_endpoints": 3, "llm_d.epp.filter.filtered_endpoints": 3}
    scored = {"llm_d.epp.scorer.count": len(SCORERS), "llm_d.epp.scoring.candidate_endpoints": 3}
    spans = [
        make(1, None, "chat smol", "llmtrace-client", 0, end, kind="CLIENT", **client),
        make(2, 1, "ingress", "envoy", 1, end - 1, kind="SERVER", **INGRESS),
        make(3, 2, "gateway.request", epp, 2, end - 2, kind="SERVER", instance=arm, **gateway),
        make(
            4,
            3,
            "gateway.request_orchestration",
            epp,
            2.1,
            4,
            kind="SERVER",
            instance=arm,
            target_model="smol",
            request_prio=0,
        ),
        make(5, 4, "run_scheduler_profile", epp, 2.2, 3.9, **{"llm_d.epp.scheduling.profile.name": "default"}),
        make(6, 5, "filter_endpoints", epp, 2.3, 2.4, **filtered, **about),
        make(7, 5, "llm_d.epp.scoring", epp, 2.5, 3, **scored, **about),
    ]
    for n, (name, weight) in enumerate(SCORERS):
        told: dict[str, object] = {
            "llm_d.epp.scorer.type": name,
            "llm_d.epp.scorer.name": name,
            "llm_d.epp.scorer.weight": weight,
            "llm_d.epp.scorer.candidate_endpoints": 3,
            "llm_d.epp.scorer.endpoints_scored": 3,
            "llm_d.epp.scorer.score.max": max(per_scorer[name]),
            "llm_d.epp.scorer.score.avg": sum(per_scorer[name]) / 3,
        }
        if not upstream:
            told |= {"llmtrace.scorer.endpoints": names, "llmtrace.scorer.scores": list(per_scorer[name])}
            if name == "prefix-cache-scorer" and match is not None:
                told |= {"llmtrace.prefix.match_tokens": list(match), "llmtrace.prefix.prompt_tokens": prompt}
        spans.append(make(8 + n, 7, f"llm_d.epp.scorer.{name}", epp, 2.6, 2.7, **told))
    totals = [sum(weight * per_scorer[name][i] for name, weight in SCORERS) for i in range(3)]
    ranked = sorted(range(3), key=lambda i: -totals[i])
    pick = {
        "llm_d.epp.picker.candidate_endpoints": 3,
        "llm_d.epp.picker.top_endpoints": [names[i] for i in ranked],
        "llm_d.epp.picker.top_scores": [totals[i] for i in ranked],
    }
    server = {
        "gen_ai.request.id": "chatcmpl-r-1",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.n": 1,
        "gen_ai.usage.prompt_tokens": prompt,
        "gen_ai.usage.completion_tokens": 8,
        "gen_ai.latency.time_in_queue": 0.001,
        "gen_ai.latency.time_to_first_token": (ttft_ms - 6) / 1e3,
        "gen_ai.latency.time_in_model_prefill": (ttft_ms - 8) / 1e3,
        "gen_ai.latency.time_in_model_decode": 0.34,
        "gen_ai.latency.time_in_model_inference": (ttft_ms + 332) / 1e3,
        "gen_ai.latency.e2e": (ttft_ms + 340) / 1e3,
    }
    spans.append(make(11, 5, "pick_endpoints", epp, 3.1, 3.2, **pick, **about))
    parent = 2 if upstream else 3
    spans.append(make(12, parent, "llm_request", "vllm", 5, end - 4, kind="SERVER", instance=endpoint, **server))
    common = {"gen_ai.request.id": "chatcmpl-r-1", "llmtrace.engine.id": "e0", "llmtrace.engine.dp_rank": 0}
    phases: tuple[tuple[str, float, float, dict[str, object]], ...] = (
        ("queue", 6, 7, {"llmtrace.queue.reason": "admission"}),
        (
            "prefill",
            7,
            ttft_ms - 1,
            {
                "gen_ai.usage.input_tokens": prompt,
                "gen_ai.usage.cache_read.input_tokens": cached,
                "llmtrace.prefill.chunks": 1,
                "llmtrace.prefill.computed_tokens": prompt - cached,
                "llmtrace.prefill.local_cached_tokens": cached,
                "llmtrace.prefill.external_cached_tokens": 0,
            },
        ),
        ("decode", ttft_ms - 1, end - 8, {"gen_ai.usage.output_tokens": 8}),
    )
    for n, (name, start, stop, told) in enumerate(phases, 13):
        spans.append(make(n, 12, name, "vllm", start, stop, instance=endpoint, **common, **told))
    return Trace(trace_id, tuple(spans))


def block_trace(
    number: int,
    arm: str,
    block: int,
    requests: int,
    hits: tuple[int, int, int],
    queries: tuple[int, int, int],
    kv_block_size: int | None = 128,
) -> Trace:
    attributes: dict[str, object] = {
        "llmtrace.scenario.name": "prefix-cache",
        "llmtrace.scenario.run_id": "run-1",
        "llmtrace.scenario.arm": arm,
        "llmtrace.scenario.block": block,
        "llmtrace.scenario.requests": requests,
        "llmtrace.scenario.servers": list(SERVERS),
        "llmtrace.scenario.prefix_cache_hits": list(hits),
        "llmtrace.scenario.prefix_cache_queries": list(queries),
        "gen_ai.request.model": "smol",
    }
    if kv_block_size:
        attributes["llmtrace.kv_block_size"] = kv_block_size
    one = span(f"{number:032x}", 1, None, "llmtrace.scenario.block", "llmtrace-client", 0, 9000, **attributes)
    return Trace(one.trace_id, (one,))


def changed(trace: Trace, span_name: str, attributes: Attributes | None = None, /, **fields: object) -> Trace:
    """The trace with the fields and attributes of the spans of one name changed."""
    return Trace(
        trace.trace_id,
        tuple(
            replace(s, **fields, attributes={**s.attributes, **(attributes or {})}) if s.name == span_name else s  # type: ignore[arg-type]
            for s in trace.spans
        ),
    )
