"""Traces of requests that may be split over a prefill and a decode server, as the stack makes them, and whole runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from example_traces import INGRESS, T0, span

from llmtrace.traces.model import Span, Trace

ARMS = ("by-threshold", "always-split", "never-split")
SERVERS = ("prefill-0", "decode-0", "decode-1")
ROLES = ("prefill", "decode", "decode")
PORTS = {"prefill-0": 8101, "decode-0": 8102, "decode-1": 8103}
DECIDERS = {
    "by-threshold": ("prefix-based-pd-decider", 512, 0),
    "always-split": ("always-disagg-pd-decider", None, None),
    "never-split": ("prefix-based-pd-decider", 0, 0),
}
KV_BLOCK = 32
BLOCK_BYTES = 737_280
"""Of SmolLM2-135M: 30 layers, keys and values, three heads of 64 numbers of two bytes, for each token of the block."""
TENANTS = ("greenhouse", "harbour", "library", "observatory")
EPP, SIDECAR, VLLM = "llm-d-epp", "llm-d-disagg-sidecar", "vllm"


@dataclass
class _Builder:
    trace_id: str
    origin_ns: int
    spans: list[Span] = field(default_factory=list)

    def add(
        self,
        parent: int | None,
        name: str,
        service: str,
        start: float,
        end: float,
        /,
        kind: str = "INTERNAL",
        **more: object,
    ) -> int:
        number = len(self.spans) + 1
        instance = str(more.pop("instance", ""))
        made = span(
            self.trace_id,
            number,
            parent,
            name,
            service,
            start,
            end,
            kind=kind,
            instance=instance,
            origin_ns=self.origin_ns,
            **more,
        )
        self.spans.append(made)
        return number


@dataclass(frozen=True)
class Request:
    """What the trace is to say. ``prompt`` and ``cached`` are vLLM's own tokens, those on the decode server."""

    number: int = 1
    arm: str = "by-threshold"
    pair_id: str = "harbour-0-0-desk-0"
    tenant: str = "harbour"
    block: int = 0
    start_ms: float = 0.0
    split: bool = True
    reason: str = "uncached_at_or_above_threshold"
    prompt: int = 1640
    cached: int = 0
    believed: int | None = None
    """Cached tokens as the picker believes; None: those that are."""
    estimate: float = 1.0
    """The picker's tokens for one of the model's."""
    decode: str = "decode-0"
    ttft_ms: float = 900.0
    decode_ms: float = 800.0
    output: int = 16
    load_ms: float = 40.0
    transfer_ms: float | None = 12.5
    threshold: int = 512
    minimum: int = 0
    prefill_endpoints: int = 1
    upstream: bool = False
    plugin: bool = True
    whole_blocks: bool = False
    """vLLM 0.9 transfers only blocks that are full; the newer ones transfer all that the decode server lacks."""
    run_id: str = "run-1"


def pd_trace(request: Request | None = None, /, **changes: object) -> Trace:
    """One good trace; ``upstream`` gives llm-d's shape: no llmtrace.* of the picker, the sidecar under the caller."""
    r = Request(**{**(request.__dict__ if request else {}), **changes})  # type: ignore[arg-type]
    b = _Builder(f"{r.number:032x}", T0 + int(r.start_ms * 1e6))
    end = r.ttft_ms + r.decode_ms
    client = b.add(None, "chat smol", "llmtrace-client", 0, end, kind="CLIENT", **_client(r, end))
    ingress = b.add(client, "ingress", "envoy", 0.5, end - 0.5, kind="SERVER", **INGRESS)
    gateway_end = end - 1
    gateway = b.add(ingress, "gateway.request", EPP, 1, gateway_end, kind="SERVER", instance=r.arm, **_gateway(r))
    _schedule(b, r, gateway)
    _serve(b, r, ingress if r.upstream else gateway, end - 2)
    return Trace(b.trace_id, tuple(b.spans))


def _client(r: Request, end: float) -> dict[str, object]:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smol",
        "gen_ai.usage.input_tokens": r.prompt,
        "gen_ai.usage.output_tokens": r.output,
        # Of a split request vLLM reports what the prefill server had cached.
        "gen_ai.usage.cache_read.input_tokens": 0 if r.split else r.cached,
        "llmtrace.client.ttft_ms": r.ttft_ms,
        "llmtrace.client.e2e_ms": end,
        "llmtrace.scenario.name": "pd-disaggregation",
        "llmtrace.scenario.run_id": r.run_id,
        "llmtrace.scenario.arm": r.arm,
        "llmtrace.scenario.pair_id": r.pair_id,
        "llmtrace.scenario.block": r.block,
        "llmtrace.tenant": r.tenant,
        "llmtrace.conversation": r.pair_id.rpartition("-")[0],
        "llmtrace.turn": 0,
    }


def _gateway(r: Request) -> dict[str, object]:
    if r.upstream:
        return {"gen_ai.request.id": "r-1"}
    return {
        "gen_ai.request.id": "r-1",
        "llmtrace.endpoint.address": f"127.0.0.1:{PORTS[r.decode] + 100}",
        "llmtrace.endpoint.name": f"default/{r.decode}",
        "llmtrace.gateway.ttft_ms": r.ttft_ms - 3,
    }


def _estimates(r: Request) -> tuple[int, int]:
    """Prompt and cached tokens as the picker counts them."""
    cached = r.cached if r.believed is None else r.believed
    return round(r.prompt * r.estimate), round(cached * r.estimate)


def _schedule(b: _Builder, r: Request, gateway: int) -> None:
    about = {"gen_ai.request.id": "r-1", "gen_ai.request.model": "smol"}
    orchestration = b.add(
        gateway, "gateway.request_orchestration", EPP, 1.1, 4, kind="SERVER", target_model="smol", request_prio=0
    )

    def step(at: float, decision: str) -> None:
        told = {**about, "mm.modality": "none", "mm.hash_count": 0, "llm_d.epp.profile_handler.decision": decision}
        b.add(orchestration, "pick_disagg_profile", EPP, at, at + 0.05, **told)

    def profile(at: float, name: str, endpoints: tuple[str, ...], scorers: tuple[str, ...]) -> None:
        made = b.add(
            orchestration, "run_scheduler_profile", EPP, at, at + 0.8, **{"llm_d.epp.scheduling.profile.name": name}
        )
        left = {"llm_d.epp.filter.candidate_endpoints": 3, "llm_d.epp.filter.filtered_endpoints": len(endpoints)}
        b.add(made, "filter_endpoints", EPP, at + 0.1, at + 0.2, **left, **about)
        if not endpoints:
            return
        counted = {"llm_d.epp.scorer.count": len(scorers), "llm_d.epp.scoring.candidate_endpoints": len(endpoints)}
        scoring = b.add(made, "llm_d.epp.scoring", EPP, at + 0.3, at + 0.5, **counted, **about)
        for scorer in scorers:
            b.add(scoring, f"llm_d.epp.scorer.{scorer}", EPP, at + 0.35, at + 0.4, **_scored(r, scorer, endpoints))
        pick = {
            "llm_d.epp.picker.candidate_endpoints": len(endpoints),
            "llm_d.epp.picker.top_endpoints": [f"default/{e}" for e in endpoints],
            "llm_d.epp.picker.top_scores": [1.0] * len(endpoints),
        }
        b.add(made, "pick_endpoints", EPP, at + 0.6, at + 0.7, **pick, **about)

    step(1.15, "run_decode")
    profile(1.2, "decode", ("decode-0", "decode-1"), ("prefix-cache-scorer", "queue-scorer"))
    if r.split or r.reason == "no_prefill_endpoint":
        step(2.05, "run_prefill")
        profile(2.1, "prefill", ("prefill-0",)[: r.prefill_endpoints if r.split else 0], ("queue-scorer",))
    step(3.0, "complete_prefill-decode" if r.split else "complete_decode-only")
    b.add(orchestration, "prepare_disaggregation", EPP, 3.2, 3.3, **about, **_prepared(r))


def _scored(r: Request, scorer: str, endpoints: tuple[str, ...]) -> dict[str, object]:
    prompt, cached = _estimates(r)
    prefix = scorer == "prefix-cache-scorer"
    scores = [cached / prompt if prefix and e == r.decode else 0.0 if prefix else 1.0 for e in endpoints]
    told: dict[str, object] = {
        "llm_d.epp.scorer.type": scorer,
        "llm_d.epp.scorer.name": scorer,
        "llm_d.epp.scorer.weight": 2.0 if prefix else 1.0,
        "llm_d.epp.scorer.candidate_endpoints": len(endpoints),
        "llm_d.epp.scorer.endpoints_scored": len(endpoints),
        "llm_d.epp.scorer.score.max": max(scores),
        "llm_d.epp.scorer.score.avg": sum(scores) / len(scores),
    }
    if r.upstream:
        return told
    told |= {"llmtrace.scorer.endpoints": [f"default/{e}" for e in endpoints], "llmtrace.scorer.scores": scores}
    if prefix:
        matched = [cached if e == r.decode else 0 for e in endpoints]
        told |= {"llmtrace.prefix.match_tokens": matched, "llmtrace.prefix.prompt_tokens": prompt}
    return told


def _prepared(r: Request) -> dict[str, object]:
    told: dict[str, object] = {
        "mm.modality": "none",
        "mm.hash_count": 0,
        "llm_d.epp.pd.disaggregation_used": r.split,
        "llm_d.epp.encode.disaggregation_used": False,
        "llm_d.epp.encode.reason": "no_encode_profile_result",
    }
    if r.split:
        told |= {"llm_d.epp.pd.prefill_pod_address": "127.0.0.1", "llm_d.epp.pd.prefill_pod_port": "8101"}
    else:
        told["llm_d.epp.pd.reason"] = "no_prefill_profile_result"
    if r.upstream:
        return told
    prompt, cached = _estimates(r)
    decider = DECIDERS[r.arm][0]
    told |= {
        "llmtrace.pd.decision": "split" if r.split else "unified",
        "llmtrace.pd.reason": r.reason,
        "llmtrace.pd.decider": decider,
        "llmtrace.pd.decode_endpoint": f"default/{r.decode}",
        "llmtrace.pd.decode_waiting": 1,
    }
    if r.split:
        told |= {"llmtrace.pd.prefill_endpoint": "default/prefill-0", "llmtrace.pd.prefill_waiting": 0}
    if r.arm == "never-split":
        told["llmtrace.pd.threshold_tokens"] = 0
    if r.arm == "by-threshold":
        told |= {
            "llmtrace.pd.threshold_tokens": r.threshold,
            "llmtrace.pd.minimum_prompt_tokens": r.minimum,
            "llmtrace.pd.prompt_tokens": prompt,
        }
        if r.reason not in ("prompt_below_minimum", "no_prefix_data"):
            told["llmtrace.pd.cached_tokens"] = cached
    return told


def _serve(b: _Builder, r: Request, parent: int, end: float) -> None:
    http: dict[str, object] = {
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
        "http.response.status_code": 200,
    }
    server = b.add(
        parent,
        "llm_d.pd_proxy.POST /v1/chat/completions",
        SIDECAR,
        4.5,
        end,
        kind="SERVER",
        instance=f"sidecar-{r.decode}",
        **http,
        **{"url.scheme": "http", "url.path": "/v1/chat/completions", "server.port": PORTS[r.decode] + 100},
    )
    about = {
        "llm_d.pd_proxy.connector": "nixlv2",
        "llm_d.pd_proxy.kv_connector": "nixlv2",
        "llm_d.pd_proxy.ec_connector": "",
        "llm_d.pd_proxy.request_path": "/v1/chat/completions",
        "llm_d.openai.api": "chat_completions",
        "llm_d.pd_proxy.disaggregation_used": r.split,
    }
    more = (
        {"llm_d.pd_proxy.prefill_target": "127.0.0.1:8101", "llm_d.pd_proxy.prefill_candidates": 1}
        if r.split
        else {"llm_d.pd_proxy.reason": "no_prefill_header"}
    )
    forward = b.add(server, "forward_request", SIDECAR, 4.6, end - 0.1, kind="SERVER", **about, **more)

    def call(above: int, start: float, until: float, name: str) -> int:
        url = f"http://127.0.0.1:{PORTS[name]}/v1/chat/completions"
        told = {**http, "server.port": PORTS[name], "url.full": url}
        return b.add(above, "HTTP POST", SIDECAR, start, until, kind="CLIENT", **told)

    if not r.split:
        _engine(b, r, call(forward, 5, end - 0.2, r.decode), r.decode, 5.5, end - 0.5, r.ttft_ms - 2)
        return
    prefill_end = r.ttft_ms - r.load_ms - 30
    leg: dict[str, object] = {"llm_d.pd_proxy.request_id": "r-1", "llm_d.pd_proxy.connector": "nixlv2"}
    status = {"llm_d.pd_proxy.prefill.status_code": 200, "llm_d.pd_proxy.prefill.duration_ms": prefill_end - 5}
    prefill = b.add(
        forward,
        "prefill",
        SIDECAR,
        5,
        prefill_end,
        **leg,
        **status,
        **{"llm_d.pd_proxy.prefill_target": "127.0.0.1:8101"},
    )
    _engine(
        b, r, call(prefill, 5.2, prefill_end - 0.2, "prefill-0"), "prefill-0", 6, prefill_end - 0.5, prefill_end - 1
    )
    times = dict.fromkeys(
        (
            "llm_d.pd_proxy.decode.duration_ms",
            "llm_d.pd_proxy.total_duration_ms",
            "llm_d.pd_proxy.true_ttft_ms",
            "llm_d.pd_proxy.prefill_duration_ms",
            "llm_d.pd_proxy.decode_duration_ms",
            "llm_d.pd_proxy.coordinator_overhead_ms",
        ),
        1.0,
    )
    ways = {"llm_d.pd_proxy.decode.streaming": True, "llm_d.pd_proxy.decode.data_parallel": False}
    start = prefill_end + 1
    decode = b.add(prefill if r.upstream else forward, "decode", SIDECAR, start, end - 0.2, **leg, **ways, **times)
    _engine(b, r, call(decode, start + 1, end - 0.3, r.decode), r.decode, start + 2, end - 0.5, r.ttft_ms - 2)


def _engine(b: _Builder, r: Request, parent: int, server: str, start: float, end: float, first: float) -> None:
    """One llm_request whose first token comes at ``first``, and the plugin's spans below it."""
    prefills, alone = server == "prefill-0", not r.split
    output = 1 if prefills else r.output
    about: dict[str, object] = {
        "gen_ai.request.id": "r-1",
        "llmtrace.engine.id": f"engine-{server}",
        "llmtrace.engine.dp_rank": 0,
    }
    request = b.add(
        parent,
        "llm_request",
        VLLM,
        start,
        end,
        kind="SERVER",
        instance=server,
        **(about if r.plugin else {"gen_ai.request.id": "r-1"}),
        **{
            "gen_ai.usage.prompt_tokens": r.prompt,
            "gen_ai.usage.completion_tokens": output,
            "gen_ai.latency.time_in_queue": 0.001,
            "gen_ai.latency.time_to_first_token": (first - start) / 1e3,
            "gen_ai.latency.time_in_model_prefill": (first - start) / 1e3,
            "gen_ai.latency.time_in_model_decode": (end - first) / 1e3,
            "gen_ai.latency.time_in_model_inference": (end - start) / 1e3,
            "gen_ai.latency.e2e": (end - start) / 1e3,
        },
    )
    if not r.plugin:
        return
    local = 0 if prefills else r.cached
    there = r.prompt // KV_BLOCK * KV_BLOCK if r.whole_blocks else r.prompt
    external = 0 if prefills or alone else max(there - r.cached, 0)
    blocks = -(-external // KV_BLOCK)
    cursor = start + 0.5

    def phase(name: str, until: float, **told: object) -> None:
        nonlocal cursor
        b.add(request, name, VLLM, cursor, until, instance=server, **about, **told)
        cursor = until

    phase("queue", cursor + 0.5, **{"llmtrace.queue.reason": "admission", "llmtrace.queue.position": 0})
    if external:
        load: dict[str, object] = {
            "llmtrace.kv_load.tokens": external,
            "llmtrace.kv_load.blocks": blocks,
            "llmtrace.kv_load.bytes": blocks * BLOCK_BYTES,
            "llmtrace.kv_load.failed": False,
            "llmtrace.kv_load.remote_engine_id": "engine-prefill-0",
        }
        if r.transfer_ms is not None:
            load["llmtrace.kv_load.transfer_ms"] = r.transfer_ms
        phase("kv_load", cursor + r.load_ms - 10, **load)
        phase("queue", cursor + 1, **{"llmtrace.queue.reason": "kv_loaded"})
    phase(
        "prefill",
        first,
        **{
            "gen_ai.usage.input_tokens": r.prompt,
            "gen_ai.usage.cache_read.input_tokens": local + external,
            "llmtrace.prefill.chunks": 1,
            "llmtrace.prefill.computed_tokens": r.prompt - local - external,
            "llmtrace.prefill.local_cached_tokens": local,
            "llmtrace.prefill.external_cached_tokens": external,
        },
    )
    if output > 1:
        tpot = (end - first) / (output - 1)
        told = {"llmtrace.decode.tpot_mean_ms": tpot, "llmtrace.decode.gap_max_ms": 1.5 * tpot}
        phase("decode", end, **{"gen_ai.usage.output_tokens": output}, **told)


def pd_block(number: int, arm: str, block: int, requests: list[Request]) -> Trace:
    """The driver's span of a block, with the counters that these requests move."""
    hits, queries = dict.fromkeys(SERVERS, 0), dict.fromkeys(SERVERS, 0)
    for r in requests:
        hits[r.decode] += r.cached
        queries[r.decode] += r.prompt
        queries["prefill-0"] += r.prompt if r.split else 0
    decider, threshold, minimum = DECIDERS[arm]
    told: dict[str, object] = {
        "llmtrace.scenario.name": "pd-disaggregation",
        "llmtrace.scenario.run_id": "run-1",
        "llmtrace.scenario.arm": arm,
        "llmtrace.scenario.block": block,
        "llmtrace.scenario.requests": len(requests),
        "llmtrace.scenario.servers": list(SERVERS),
        "llmtrace.scenario.server_roles": list(ROLES),
        "llmtrace.scenario.prefix_cache_hits": list(hits.values()),
        "llmtrace.scenario.prefix_cache_queries": list(queries.values()),
        "llmtrace.kv_block_size": KV_BLOCK,
        "gen_ai.request.model": "smol",
        "llmtrace.pd.decider": decider,
    }
    if threshold is not None:
        told |= {"llmtrace.pd.threshold_tokens": threshold, "llmtrace.pd.minimum_prompt_tokens": minimum}
    one = span(f"{number:032x}", 1, None, "llmtrace.scenario.block", "llmtrace-client", 0, 9000, **told)
    return Trace(one.trace_id, (one,))


Millis = Callable[[int, bool], float]


def choice(arm: str, uncached: int, prompt: int, threshold: int = 512, minimum: int = 0) -> tuple[bool, str]:
    """What the decider of an arm does, and its word for it."""
    if arm == "always-split":
        return True, "always"
    if arm == "never-split":
        return False, "splitting_disabled"
    if prompt < minimum:
        return False, "prompt_below_minimum"
    if uncached >= threshold:
        return True, "uncached_at_or_above_threshold"
    return False, "uncached_below_threshold"


def pd_run(
    ttft: Millis,
    decode: Millis | None = None,
    *,
    blocks: int = 4,
    each: int = 6,
    noise_ms: float = 10.0,
    estimate: float = 1.0,
    **fixed: object,
) -> list[Trace]:
    """A run of all arms. ``ttft(uncached, split)`` are ms without noise, ``decode`` those after the first token.

    Uncached tokens are spread evenly from 40 to 1,640: in each block and tenant ``each`` requests of different ones, of
    which every third has another 1,024 tokens cached on its decode server.
    """
    rng = random.Random(5)
    traces: list[Trace] = []
    spread = [40 + 1600 * n // (blocks * len(TENANTS) * each - 1) for n in range(blocks * len(TENANTS) * each)]
    rng.shuffle(spread)
    drawn = {(block, tenant, n): spread.pop() for block in range(blocks) for tenant in TENANTS for n in range(each)}
    for block in range(blocks):
        for arm in ARMS:
            sent = []
            for (of_block, tenant, n), uncached in drawn.items():
                if of_block != block:
                    continue
                cached = 1024 if n % 3 == 0 else 0
                believed = round((uncached + cached) * estimate), round(cached * estimate)
                split, reason = choice(arm, believed[0] - believed[1], believed[0])
                request = Request(
                    number=len(traces) + 1,
                    arm=arm,
                    pair_id=f"{tenant}-{block}-{n}",
                    tenant=tenant,
                    block=block,
                    start_ms=100.0 * len(traces),
                    split=split,
                    reason=reason,
                    prompt=uncached + cached,
                    cached=cached,
                    estimate=estimate,
                    decode=("decode-0", "decode-1")[n % 2],
                    ttft_ms=ttft(uncached, split) + rng.gauss(0, noise_ms),
                    decode_ms=(decode(uncached, split) if decode else 800.0) + rng.gauss(0, noise_ms),
                    **fixed,  # type: ignore[arg-type]
                )
                sent.append(request)
                traces.append(pd_trace(request))
            traces.append(pd_block(900_000 + len(traces), arm, block, sent))
    return traces
