"""The picker's trace against the one recorded from llm-d's own endpoint picker (v0.10, three scorers)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from picking import Picker, chat, request_body, request_headers, response_body, response_headers

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


def request(picker: Picker) -> None:
    exchange = picker.exchange()
    exchange.handle(request_headers())
    exchange.handle(request_body(chat("word " * 200)))
    exchange.handle(response_headers())
    exchange.handle(response_body(json.dumps({"choices": []}).encode()))
    exchange.close()


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
        assert all(key.startswith(("llmtrace.", "gen_ai.", "http.")) for key in ours.keys() - attributes.keys()) or (
            name == "pick_endpoints"
        ), f"{name} has attributes beyond llm-d's under names of its own only"
    top = found["pick_endpoints"].attributes["llm_d.epp.picker.top_endpoints"]
    assert sorted(top) == ["default/vllm-0", "default/vllm-1"]  # type: ignore[type-var, arg-type]
