"""Which traces the real gateway Collector keeps, and what it loses when it is killed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from collecting import Backend, Collector, backend, collecting, documented, read, spans_of, wait_for
from loopback import sample_sum, until
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from llmtrace.traces.otlp import attributes, key_values

NONE = {"SAMPLED_PERCENT": "0", "SAMPLED_TENANTS": "[gold, silver]", "SAMPLED_TENANTS_PERCENT": "100"}
SLOW = {"WAITED_MS": "800", "SLOW_TTFT_MS": "500", "SLOW_TPOT_MS": "50", "SLOW_TOTAL_MS": "5000"}
ROOT = {"name": "ingress"}
PARENT = b"\x09" * 8
ERROR = Status(code=Status.STATUS_CODE_ERROR)


def request(completion: int, decode: float) -> dict[str, Any]:
    return {"gen_ai.usage.completion_tokens": completion, "gen_ai.latency.time_in_model_decode": decode}


KEPT: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "an error": ("errors", [ROOT, {"parent_span_id": PARENT, "status": ERROR}]),
    "an error that is an attribute": ("errors-by-attribute", [ROOT, {"attributes": {"error.type": "timeout"}}]),
    "Envoy's error": ("errors-by-attribute", [ROOT | {"attributes": {"error": "true"}}]),
    "an error that is a flag": ("errors-by-attribute", [ROOT | {"attributes": {"error": True}}]),
    "HTTP 503 as Envoy says it": ("errors-by-attribute", [ROOT | {"attributes": {"http.status_code": "503"}}]),
    "no response": ("errors-by-attribute", [ROOT | {"attributes": {"http.status_code": "0"}}]),
    "HTTP 500 as a number": ("errors-by-attribute", [ROOT | {"attributes": {"http.status_code": 500}}]),
    "HTTP 502": ("errors-by-attribute", [ROOT, {"attributes": {"http.response.status_code": 502}}]),
    "an exception": ("errors-by-attribute", [ROOT, {"events": [Span.Event(name="exception")]}]),
    "an aborted request": ("errors-by-attribute", [ROOT, {"events": [Span.Event(name="abort")]}]),
    "a failed KV load": ("errors-by-attribute", [ROOT, {"attributes": {"llmtrace.kv_load.failed": True}}]),
    "slow TTFT of vLLM": ("slow-ttft", [ROOT, {"attributes": {"gen_ai.latency.time_to_first_token": 0.6}}]),
    "slow TTFT at the gateway": ("slow-ttft", [ROOT, {"attributes": {"llmtrace.gateway.ttft_ms": 600.0}}]),
    "slow TTFT at the client": ("slow-ttft", [ROOT, {"attributes": {"llmtrace.client.ttft_ms": 600.0}}]),
    "slow TPOT": ("slow-tpot", [ROOT, {"attributes": request(11, 0.6)}]),
    "slow TPOT of the plugin": ("slow-tpot", [ROOT, {"attributes": {"llmtrace.decode.tpot_mean_ms": 60.0}}]),
    "slow as a whole": ("slow-total", [ROOT | {"seconds": 6.0}]),
    "still running": ("unfinished", [{"parent_span_id": PARENT, "name": "run_scheduler_profile"}]),
    "a marked split": (
        "marked",
        [ROOT, {"attributes": {"llmtrace.pd.decision": "split", "llmtrace.sampling.keep": True}}],
    ),
    "waited in flow control": ("waited", [ROOT, {"name": "llmtrace.flow_control.queue", "seconds": 0.9}]),
    "waited in llm-d's picker": ("waited", [ROOT, {"name": "gateway.request_orchestration", "seconds": 0.9}]),
    "a scaling decision": ("scaling", [{"name": "autoscale.decision"}]),
    "a step of the engine": ("steps", [{"name": "engine_step"}, {"name": "engine_step"}]),
    "a tenant with a share": ("share-of-tenants", [ROOT, {"attributes": {"llmtrace.tenant": "gold"}}]),
}
"""The policy that keeps a trace, no other, and the trace's spans."""
DROPPED: dict[str, list[dict[str, Any]]] = {
    "nothing special": [
        ROOT | {"attributes": {"http.status_code": "200"}},
        {"attributes": {"http.response.status_code": 404}},
    ],
    "fast": [ROOT, {"attributes": {"gen_ai.latency.time_to_first_token": 0.4} | request(11, 0.4)}],
    "one token": [ROOT, {"attributes": request(1, 9.0)}],
    "a split that nobody marked": [ROOT, {"attributes": {"llmtrace.pd.decision": "split"}}],
    "a mark that says no": [ROOT, {"attributes": {"llmtrace.sampling.keep": False}}],
    "a picker's request": [{"parent_span_id": PARENT, "name": "gateway.request"}],
    "hardly waited": [
        ROOT | {"seconds": 2.0},
        {"name": "llmtrace.flow_control.queue", "seconds": 0.7},
        {"name": "gateway.request_orchestration", "seconds": 0.7},
        {"name": "gateway.request", "seconds": 2.0},
    ],
    "another tenant": [ROOT, {"attributes": {"llmtrace.tenant": "bronze"}}],
}


def test_what_is_kept(tmp_path: Path) -> None:
    sent = {name: spans for name, (_, spans) in KEPT.items()} | DROPPED
    ids = {name: bytes([index + 1]) * 16 for index, name in enumerate(sent)}
    names = {trace_id: name for name, trace_id in ids.items()}
    with backend() as store, collecting("gateway", tmp_path, store, NONE | SLOW) as collector:
        for name, spans in sent.items():
            # Each span by a request of its own, as from different components.
            for span in spans:
                assert collector.send(spans_of({"trace": ids[name], **span}))
        wait_for(store, {ids[name] for name in KEPT})
        until(lambda: decided(collector) == len(ids), "all decisions", 20, poll_s=0.2)
        assert {names[span.trace_id] for span in store.spans()} == KEPT.keys()
        counts = {name: sum(span.trace_id == ids[name] for span in store.spans()) for name in KEPT}
        assert counts == {name: len(sent[name]) for name in KEPT}
        assert votes(collector) == Counter(policy for policy, _ in KEPT.values())
        # What comes late follows the decision.
        late = b"\xee" * 8
        for name in ("nothing special", "an error"):
            assert collector.send(
                spans_of({"trace": ids[name], "span": late, "parent_span_id": PARENT, "status": ERROR})
            )
        until(lambda: late in store.span_ids(), "the late span", 20)
        assert [names[s.trace_id] for s in store.spans() if s.span_id == late] == ["an error"]


def votes(collector: Collector) -> dict[str, float]:
    """How many traces each policy wanted, of those that wanted any."""
    metric = "otelcol_processor_tail_sampling_count_traces_sampled_total"
    policies = [policy["name"] for policy in read("gateway")["processors"]["tail_sampling"]["policies"]]
    found = {name: sample_sum(collector.page(), metric, policy=name, sampled="true") for name in policies}
    return {name: number for name, number in found.items() if number}


def decided(collector: Collector) -> float:
    return sample_sum(collector.page(), "otelcol_processor_tail_sampling_global_count_traces_sampled_total")


def test_the_marking_that_the_documentation_shows(tmp_path: Path) -> None:
    """The file of docs/collector.md, after those of the gateway."""
    reasons = {"no_prefill_endpoint": b"\x01" * 16, "uncached_below_threshold": b"\x02" * 16}
    with backend() as store, collecting("gateway", tmp_path, store, NONE, documented("transform/marks")) as collector:
        for reason, trace in reasons.items():
            decision = {"name": "prepare_disaggregation", "parent_span_id": PARENT, "trace": trace}
            assert collector.send(
                spans_of(ROOT | {"trace": trace}, decision | {"attributes": {"llmtrace.pd.reason": reason}})
            )
        until(lambda: decided(collector) == 2, "both decisions", 20, poll_s=0.2)
        wait_for(store, {reasons["no_prefill_endpoint"]})
        assert {span.trace_id for span in store.spans()} == {reasons["no_prefill_endpoint"]}
        assert votes(collector) == {"marked": 1}


def test_a_share_of_the_rest(tmp_path: Path) -> None:
    """Of 400 traces 25 %: between 15 % and 35 % with a certainty that no run will see the contrary of."""
    with backend() as store, collecting("gateway", tmp_path, store, {"SAMPLED_PERCENT": "25"}) as collector:
        assert collector.send(spans_of(*({"attributes": {"llmtrace.tenant": f"t{n}"}} for n in range(400))))
        until(lambda: decided(collector) == 400, "all decisions", 20, poll_s=0.2)
        until(lambda: len(store.spans()) >= 60, "the share", 20)
        assert 60 <= len(store.spans()) <= 140


def test_two_tenants_have_two_shares(tmp_path: Path) -> None:
    """As Envoy names them, on the request's own span: all of gold's traces, and 25 % of bronze's as of the rest."""
    shares = {"SAMPLED_TENANTS": "[gold]", "SAMPLED_TENANTS_PERCENT": "100", "SAMPLED_PERCENT": "25"}
    with backend() as store, collecting("gateway", tmp_path, store, shares) as collector:
        requests = [ROOT | {"attributes": {"llmtrace.tenant": tenant}} for tenant in ("gold", "bronze") * 200]
        assert collector.send(spans_of(*requests))
        until(lambda: decided(collector) == 400, "all decisions", 20, poll_s=0.2)
        until(lambda: len(tenants(store)) >= 220 and tenants(store).count("gold") == 200, "the shares", 20)
        assert 20 <= tenants(store).count("bronze") <= 80


def tenants(store: Backend) -> list[object]:
    return [attributes(span.attributes)["llmtrace.tenant"] for span in store.spans()]


def test_span_metrics_count_what_sampling_drops(tmp_path: Path) -> None:
    with backend() as store, collecting("gateway", tmp_path, store, NONE) as collector:
        assert collector.send(spans_of(*(dict(ROOT) for _ in range(50))))
        until(lambda: decided(collector) == 50, "all decisions", 20, poll_s=0.2)
        until(lambda: counted(store, "ingress") == 50, "the metric", 20)
        assert store.spans() == []


def counted(store: Backend, name: str) -> int:
    wanted = key_values({"span.name": name})[0]
    return max(
        (
            point.as_int
            for request in store.metric_requests()
            for group in request.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
            if metric.name == "llmtrace.span.calls"
            for point in metric.sum.data_points
            if wanted in point.attributes
        ),
        default=0,
    )


def test_a_stop_decides_and_a_kill_loses_only_what_waits(tmp_path: Path) -> None:
    waiting = {"SAMPLED_PERCENT": "100", "DECISION_WAIT": "60s", "DECISION_WAIT_AFTER_ROOT": "1s"}
    running = {"name": "llm_request", "parent_span_id": PARENT}
    done, stopped, killed = (bytes([n]) * 16 for n in (1, 2, 3))
    with backend() as store, collecting("gateway", tmp_path, store, waiting) as collector:
        # Decided, and in the queue on disk, as the backend is down; the others wait for their roots.
        store.stop()
        assert collector.send(spans_of({"trace": done, **ROOT}))
        until(lambda: decided(collector) == 1, "the decision", 20, poll_s=0.2)
        assert collector.send(spans_of({"trace": stopped, **running}))
        collector.stop()
        collector.start()
        assert collector.send(spans_of({"trace": killed, **running}))
        collector.kill()
        collector.start()
        store.start()
        wait_for(store, {done, stopped})
        assert {span.trace_id for span in store.spans()} == {done, stopped}
