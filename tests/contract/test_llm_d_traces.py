"""The picker's traces against those recorded from llm-d's own endpoint picker (v0.10)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from picking import DISAGGREGATED, Picker, chat, request_body, request_headers, response_body, response_headers

from llmtrace.picker.endpoints import Endpoint
from llmtrace.traces.model import Span

SCHEDULING = "llm-d-router/pkg/epp/scheduling"
REQUEST = {"gen_ai.request.model": "smol", "gen_ai.request.id": "r1"}
PREFIX = "prefix-cache-scorer"
QUEUE = "queue-scorer"
KV = "kv-cache-utilization-scorer"


def scorer(kind: str, weight: float, highest: float, mean: float) -> dict[str, object]:
    return {
        "llm_d.epp.scorer.type": kind,
        "llm_d.epp.scorer.name": kind,
        "llm_d.epp.scorer.weight": weight,
        "llm_d.epp.scorer.candidate_endpoints": 2,
        "llm_d.epp.scorer.score.max": highest,
        "llm_d.epp.scorer.score.avg": mean,
        "llm_d.epp.scorer.endpoints_scored": 2,
    }


# (name, parent, kind, scope, attributes) of the second of two equal requests
RECORDED = [
    ("gateway.request", None, "SERVER", "llm-d-router/pkg/epp/handlers", {}),
    (
        "gateway.request_orchestration",
        "gateway.request",
        "SERVER",
        "llm-d-router/pkg/epp/requestcontrol",
        {"target_model": "smol", "request_prio": 0},
    ),
    (
        "run_scheduler_profile",
        "gateway.request_orchestration",
        "INTERNAL",
        SCHEDULING,
        {"llm_d.epp.scheduling.profile.name": "default"},
    ),
    (
        "filter_endpoints",
        "run_scheduler_profile",
        "INTERNAL",
        SCHEDULING,
        {"llm_d.epp.filter.candidate_endpoints": 2, "llm_d.epp.filter.filtered_endpoints": 2, **REQUEST},
    ),
    (
        "llm_d.epp.scoring",
        "run_scheduler_profile",
        "INTERNAL",
        SCHEDULING,
        {"llm_d.epp.scorer.count": 3, "llm_d.epp.scoring.candidate_endpoints": 2, **REQUEST},
    ),
    (f"llm_d.epp.scorer.{PREFIX}", "llm_d.epp.scoring", "INTERNAL", SCHEDULING, scorer(PREFIX, 2.0, 1.0, 0.5)),
    (f"llm_d.epp.scorer.{QUEUE}", "llm_d.epp.scoring", "INTERNAL", SCHEDULING, scorer(QUEUE, 1.0, 1.0, 1.0)),
    (f"llm_d.epp.scorer.{KV}", "llm_d.epp.scoring", "INTERNAL", SCHEDULING, scorer(KV, 1.0, 0.9, 0.9)),
    (
        "pick_endpoints",
        "run_scheduler_profile",
        "INTERNAL",
        SCHEDULING,
        {"llm_d.epp.picker.candidate_endpoints": 2, "llm_d.epp.picker.top_scores": [3.9, 1.9], **REQUEST},
    ),
]


def request(picker: Picker, prompt: str = "word " * 200) -> None:
    exchange = picker.exchange()
    exchange.handle(request_headers())
    exchange.handle(request_body(chat(prompt)))
    exchange.handle(response_headers())
    exchange.handle(response_body(json.dumps({"choices": []}).encode()))
    exchange.close()


def only_the_kits_own(span: Span, recorded: dict[str, object]) -> bool:
    """Whether all that a span has beyond llm-d's attributes is under the kit's own names or OpenTelemetry's."""
    return all(key.startswith(("llmtrace.", "gen_ai.", "http.")) for key in span.attributes.keys() - recorded.keys())


def test_spans_are_those_of_llm_d(tmp_path: Path) -> None:
    picker = Picker(tmp_path)
    for endpoint in picker.handle.pool:
        endpoint.load.kv_cache_usage = 0.1
    request(picker)
    picker.memory.ended.clear()
    request(picker)
    spans = {span.span_id: span for span in picker.spans}

    def parent(span: Span) -> str | None:
        return spans[span.parent_id].name if span.parent_id else None

    found = {span.name: span for span in spans.values()}
    assert sorted(found) == sorted(name for name, *_ in RECORDED)
    for name, expected_parent, kind, scope, attributes in RECORDED:
        span = found[name]
        assert (parent(span), span.kind) == (expected_parent, kind), name
        assert span.scope == scope
        ours = dict(span.attributes)
        assert {key: ours.get(key) for key in attributes} == attributes, name
        assert only_the_kits_own(span, attributes) or name == "pick_endpoints", name
    top = found["pick_endpoints"].attributes["llm_d.epp.picker.top_endpoints"]
    assert sorted(top) == ["default/vllm-0", "default/vllm-1"]  # type: ignore[type-var, arg-type]


# Prefill/decode disaggregation: the lines of the recording, a level of the tree each, without their scopes and kinds.

DISAGG = "llm-d-router/pkg/epp/framework/plugins/scheduling"
STEP = {**REQUEST, "mm.modality": "none", "mm.hash_count": 0}
NO_ENCODE = {
    "llm_d.epp.encode.disaggregation_used": False,
    "llm_d.epp.encode.reason": "no_encode_profile_result",
}
SCOPES = {
    "gateway.request": "llm-d-router/pkg/epp/handlers",
    "gateway.request_orchestration": "llm-d-router/pkg/epp/requestcontrol",
    "pick_disagg_profile": DISAGG,
    "prepare_disaggregation": DISAGG,
}
Line = tuple[int, str, dict[str, object]]


def step(decision: str) -> Line:
    return 2, "pick_disagg_profile", {**STEP, "llm_d.epp.profile_handler.decision": decision}


def profile(name: str, scores: dict[str, float], endpoint: str, total: float) -> list[Line]:
    """A profile that one of two endpoints is left for; the score of each scorer."""
    scorers: list[Line] = [
        (
            4,
            f"llm_d.epp.scorer.{kind}",
            {
                **scorer(kind, {PREFIX: 2.0, QUEUE: 1.0}[kind], score, score),
                "llm_d.epp.scorer.candidate_endpoints": 1,
                "llm_d.epp.scorer.endpoints_scored": 1,
            },
        )
        for kind, score in scores.items()
    ]
    filtered = {"llm_d.epp.filter.candidate_endpoints": 2, "llm_d.epp.filter.filtered_endpoints": 1}
    picked = {
        "llm_d.epp.picker.candidate_endpoints": 1,
        "llm_d.epp.picker.top_endpoints": [endpoint],
        "llm_d.epp.picker.top_scores": [total],
    }
    return [
        (2, "run_scheduler_profile", {"llm_d.epp.scheduling.profile.name": name}),
        (3, "filter_endpoints", {**REQUEST, **filtered}),
        (
            3,
            "llm_d.epp.scoring",
            {**REQUEST, "llm_d.epp.scorer.count": len(scores), "llm_d.epp.scoring.candidate_endpoints": 1},
        ),
        *scorers,
        (3, "pick_endpoints", {**REQUEST, **picked}),
    ]


ROOT: list[Line] = [
    (0, "gateway.request", {}),
    (1, "gateway.request_orchestration", {"target_model": "smol", "request_prio": 0}),
]
SPLIT: list[Line] = [
    *ROOT,
    step("run_decode"),
    *profile("decode", {PREFIX: 0.0, QUEUE: 1.0}, "default/decode-0", 1.0),
    step("run_prefill"),
    *profile("prefill", {QUEUE: 1.0}, "default/prefill-0", 1.0),
    step("complete_prefill-decode"),
    (
        2,
        "prepare_disaggregation",
        {
            **STEP,
            "llm_d.epp.pd.disaggregation_used": True,
            "llm_d.epp.pd.prefill_pod_address": "127.0.0.1",
            "llm_d.epp.pd.prefill_pod_port": "8101",
            **NO_ENCODE,
        },
    ),
]
UNIFIED: list[Line] = [
    *ROOT,
    step("run_decode"),
    *profile("decode", {PREFIX: 1.0, QUEUE: 1.0}, "default/decode-0", 3.0),
    step("complete_decode-only"),
    (
        2,
        "prepare_disaggregation",
        {
            **STEP,
            "llm_d.epp.pd.disaggregation_used": False,
            "llm_d.epp.pd.reason": "no_prefill_profile_result",
            **NO_ENCODE,
        },
    ),
]


def lines(spans: list[Span], parent_id: str | None = None, depth: int = 0) -> list[tuple[int, Span]]:
    """The tree of spans, which are given in the order of their ends, as lines in the order of their starts."""
    return [
        line
        for span in spans
        if span.parent_id == parent_id
        for line in ((depth, span), *lines(spans, span.span_id, depth + 1))
    ]


def test_disaggregation_has_the_spans_of_llm_d(tmp_path: Path) -> None:
    """A request with a prompt is split, the same one again is not."""
    endpoints = [
        Endpoint("prefill-0", "default", "127.0.0.1", "8101", {"llm-d.ai/role": "prefill"}),
        Endpoint("decode-0", "default", "127.0.0.1", "8102", {"llm-d.ai/role": "decode"}),
    ]
    picker = Picker(tmp_path, DISAGGREGATED, endpoints)
    for endpoint in endpoints:
        endpoint.answered_at = time.monotonic()
    for recorded in (SPLIT, UNIFIED):
        picker.memory.ended.clear()
        request(picker, "word " * 600)
        ended = {f"{span.context.span_id:016x}": number for number, span in enumerate(picker.memory.ended)}
        found = lines(sorted(picker.spans, key=lambda span: ended[span.span_id]))
        assert [(depth, span.name) for depth, span in found] == [(depth, name) for depth, name, _ in recorded]
        for (_, span), (_, name, attributes) in zip(found, recorded, strict=True):
            assert span.kind == ("SERVER" if name.startswith("gateway.") else "INTERNAL")
            assert span.scope == SCOPES.get(name, SCHEDULING)
            ours = {key: list(v) if isinstance(v, tuple) else v for key, v in span.attributes.items()}
            assert {key: ours.get(key) for key in attributes} == attributes, name
            assert only_the_kits_own(span, attributes), name
