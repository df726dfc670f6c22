"""What the real stack's Collector makes of real requests: metrics with their labels, and no texts, anywhere."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from engine_servers import in_trace, new_trace_id
from loopback import until
from stored import trace_of

from llmtrace.semconv import attributes as names
from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]
WAIT_S = 60
SERVED = (("vllm", names.SERVER_SPAN), ("envoy", "ingress"))


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack.load()


def prometheus(stack: Stack, path: str, **parameters: str | list[str]) -> Any:
    return httpx.get(f"{stack.prometheus}/api/v1/{path}", params=parameters).raise_for_status().json()["data"]


def post(stack: Stack, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    gateway = next(iter(stack.gateways.values()))
    return httpx.post(f"{gateway}{path}", json=body, headers=headers, timeout=60)


def calls(stack: Stack) -> float:
    """Requests of model servers, as spans were counted; 0 while none was."""
    query = f'sum(llmtrace_span_calls_total{{service_name="vllm",span_name="{names.SERVER_SPAN}"}})'
    found = prometheus(stack, "query", query=query)["result"]
    return float(found[0]["value"][1]) if found else 0.0


def test_no_text_of_a_request_is_in_spans_metrics_or_logs(stack: Stack) -> None:
    canary = f"CANARY{time.time_ns()}"
    headers = {
        "authorization": f"Bearer {canary}",
        "cookie": f"session={canary}",
        "user-agent": canary,
        "tracestate": f"vendor={canary}",
        "baggage": f"user={canary}",
        "x-user": canary,
        "x-envoy-downstream-service-cluster": canary,
        "x-forwarded-for": canary,
    }
    served, refused, before = new_trace_id(), new_trace_id(), calls(stack)
    chat = {"model": stack.model, "messages": [{"role": "user", "content": canary}], "max_tokens": 4, "user": canary}
    post(stack, f"/v1/chat/completions?note={canary}", chat, headers | in_trace(served)).raise_for_status()
    wrong = {"model": stack.model, "prompt": canary, "max_tokens": -1, "stop": canary}
    assert post(stack, "/v1/completions", wrong, headers | in_trace(refused)).is_client_error
    stored = [trace_of(stack, served, *SERVED), trace_of(stack, refused, SERVED[1])]
    until(lambda: calls(stack) > before, "the request in metrics of spans", WAIT_S, poll_s=0.5)
    found = {
        "spans": repr(stored),
        "series": json.dumps(prometheus(stack, "series", **{"match[]": '{__name__=~".+"}'})),
        **{path.name: path.read_text(errors="replace") for path in stack.log_dir.glob("*.log*")},
    }
    assert len(found) > 8
    assert [place for place, text in found.items() if canary in text] == []


def test_time_to_first_token_is_measured_by_cached_share(stack: Stack) -> None:
    """The same prompt of some blocks twice, by prefix-aware routing: cached the second time."""
    text = f"{time.time_ns()} " + "The harbour opens at nine and closes at five. " * 40
    ids = [new_trace_id(), new_trace_id()]
    cached = []
    for trace_id in ids:
        body = {"model": stack.model, "prompt": text, "max_tokens": 4}
        post(stack, "/v1/completions", body, in_trace(trace_id)).raise_for_status()
        (span,) = trace_of(stack, trace_id, *SERVED).named(names.SERVER_SPAN)
        cached.append(span.attributes["gen_ai.usage.cache_read.input_tokens"])
    assert cached[0] == 0
    assert cached[1] > 0
    for metric in ("gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds"):
        for trace_id, share in zip(ids, ("none", "most"), strict=True):
            until(lambda m=metric, t=trace_id: labels_with(stack, m, t), f"exemplars of {metric}", WAIT_S, poll_s=1)  # type: ignore[misc]
            labels = labels_with(stack, metric, trace_id)[0]
            assert labels["llmtrace_prompt_cached"] == share
            assert labels["llmtrace_role"] == "both"
            assert labels["gen_ai_request_model"] == stack.model
            assert labels["service_instance_id"] in {server.name for server in stack.servers}


def labels_with(stack: Stack, metric: str, trace_id: str) -> list[dict[str, str]]:
    """The labels of a histogram's series that have an exemplar of this trace."""
    return [
        series["seriesLabels"]
        for series in prometheus(stack, "query_exemplars", query=f"{metric}_bucket")
        if any(exemplar["labels"]["trace_id"] == trace_id for exemplar in series["exemplars"])
    ]
