"""The metrics that the real Collector makes of spans, and its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from collecting import FOLDER, Backend, Collector, backend, collecting, spans_of
from loopback import sample_sum, until
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from llmtrace.traces import otlp

SERVER = {
    "service.name": "vllm",
    "service.instance.id": "decode-0",
    "llmtrace.role": "decode",
    "gen_ai.request.model": "smollm2-135m",
    "k8s.namespace.name": "llm-d",
    "host.name": "not-a-label",
}
TTFT = "gen_ai.server.time_to_first_token"
TPOT = "gen_ai.server.time_per_output_token"


def metrics(store: Backend) -> Iterator[tuple[dict[str, Any], Metric]]:
    """Each metric that came, the newest first, with its resource."""
    for request in reversed(store.metric_requests()):
        for group in request.resource_metrics:
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    yield otlp.attributes(group.resource.attributes), metric


def points(store: Backend, name: str) -> list[tuple[dict[str, Any], Any]]:
    """The newest data points of a metric, with their labels."""
    for _, metric in metrics(store):
        if metric.name == name:
            found = metric.histogram.data_points or metric.sum.data_points
            return [(otlp.attributes(point.attributes), point) for point in found]
    return []


def llm_request(cached: int | None, ttft: float = 0.3, tokens: int = 5, decode: float = 0.8) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.latency.time_to_first_token": ttft,
        "gen_ai.latency.time_in_model_decode": decode,
        "gen_ai.usage.prompt_tokens": 100,
        "gen_ai.usage.completion_tokens": tokens,
    }
    if cached is not None:
        attributes["gen_ai.usage.cache_read.input_tokens"] = cached
    return {"name": "llm_request", "kind": Span.SPAN_KIND_SERVER, "seconds": 1.2, "attributes": attributes}


@pytest.mark.parametrize("name", ["local", "gateway"])
def test_time_to_first_token_and_per_output_token(name: str, tmp_path: Path) -> None:
    trace = b"\x11" * 16
    request = spans_of(
        *(llm_request(cached) for cached in (0, 49, 50, 100, None)),
        llm_request(0, ttft=4.0, tokens=1) | {"trace": trace},
        {"name": "llm_request", "attributes": {"gen_ai.usage.prompt_tokens": 9}},  # aborted: no latencies
        {"name": "decode", "attributes": {"gen_ai.latency.time_to_first_token": 1.0}},
        resource=SERVER,
    )
    with backend() as store, collecting(name, tmp_path, store) as collector:
        assert collector.send(request)
        exemplars: dict[str, set[bytes]] = {TTFT: set(), TPOT: set()}

        def complete() -> bool:
            for _, metric in metrics(store):
                for point in metric.histogram.data_points:
                    if metric.name in exemplars:
                        exemplars[metric.name] |= {e.trace_id for e in point.exemplars}
            return all(exemplars.values()) and bool(points(store, TPOT))

        until(complete, "the metrics", 20)
        ttft, tpot = points(store, TTFT), points(store, TPOT)
        kinds = {metric.name: (metric.unit, metric.WhichOneof("data")) for _, metric in metrics(store)}
        resources = [resource for resource, metric in metrics(store) if metric.name == TTFT]
    assert kinds[TTFT] == kinds[TPOT] == ("s", "histogram")
    assert {n for n in kinds if n.startswith("gen_ai")} == {TTFT, TPOT}
    assert trace in exemplars[TTFT]
    assert trace not in exemplars[TPOT]
    by_share = {labels.get("llmtrace.prompt.cached"): point for labels, point in ttft}
    assert {share: point.count for share, point in by_share.items()} == {"none": 2, "some": 1, "most": 2, None: 1}
    assert by_share["none"].sum == pytest.approx(4.3)
    assert by_share["some"].explicit_bounds[:4] == [0.001, 0.005, 0.01, 0.02]
    assert {labels.get("llmtrace.prompt.cached"): point.count for labels, point in tpot} == {
        "none": 1,
        "some": 1,
        "most": 2,
        None: 1,
    }
    assert sum(point.sum for _, point in tpot) == pytest.approx(5 * 0.2)
    labels = ttft[0][0]
    assert labels.keys() - {"llmtrace.prompt.cached"} == {
        *(
            "service.instance.id",
            "llmtrace.role",
            "gen_ai.request.model",
            "k8s.namespace.name",
            "collector.instance.id",
        ),
    }
    assert all("host.name" not in resource for resource in resources)


def test_calls_and_durations_have_the_agreed_labels(tmp_path: Path) -> None:
    decision = {"llmtrace.pd.decision": "split", "llmtrace.pd.reason": "always", "gen_ai.request.model": "other"}
    spans = [
        {"name": "prepare_disaggregation", "attributes": decision},
        {
            "name": "ingress",
            "attributes": {"llmtrace.scenario.arm": "random", "error.type": "Timeout: asked for Paris"},
        },
    ]
    request = spans_of(*spans, resource=SERVER)
    request.resource_spans[0].scope_spans[0].spans[1].status.code = Status.STATUS_CODE_ERROR
    with backend() as store, collecting("local", tmp_path, store) as collector:
        assert collector.send(request)
        until(lambda: [p for _, p in points(store, "llmtrace.span.calls") if p.as_int], "the calls", 20)
        labels = [labels for labels, _ in points(store, "llmtrace.span.calls")]
        durations = [labels for labels, _ in points(store, "llmtrace.span.duration")]
    by_name = {found["span.name"]: found for found in labels}
    common = {"service.name": "vllm", "service.instance.id": "decode-0", "llmtrace.role": "decode"}
    assert by_name["prepare_disaggregation"].items() >= (common | decision).items()
    assert by_name["ingress"].items() >= {
        *common.items(),
        *{"status.code": "STATUS_CODE_ERROR", "error.type": "_OTHER", "k8s.namespace.name": "llm-d"}.items(),
        *{"llmtrace.scenario.arm": "random", "gen_ai.request.model": "smollm2-135m"}.items(),
    }
    assert len(durations) == len(labels) == 2


def test_too_many_values_of_a_label_are_counted_together(tmp_path: Path) -> None:
    spans = [{"name": "chat", "attributes": {"gen_ai.request.model": f"m{index}"}} for index in range(700)]
    with backend() as store, collecting("local", tmp_path, store) as collector:
        assert collector.send(spans_of(*spans))
        until(lambda: [p for _, p in points(store, "llmtrace.span.calls") if p.as_int], "the calls", 20)
        found = points(store, "llmtrace.span.calls")
    over = [point.as_int for labels, point in found if labels.get("otel.metric.overflow")]
    assert over == [200]
    assert len(found) == 501


def test_the_collectors_own_metrics_say_what_came_and_went(tmp_path: Path) -> None:
    with backend() as store, collecting("local", tmp_path, store) as collector:
        assert collector.send(spans_of({}, {}))
        until(lambda: store.spans(), "the spans", 20)
        until(lambda: sample_sum(collector.page(), "otelcol_exporter_sent_spans_total") == 2, "sent spans", 10)
        page = collector.page()
    assert sample_sum(page, "otelcol_receiver_accepted_spans_total", receiver="otlp") == 2


def sample_names(collector: Collector) -> set[str]:
    return {line.partition("{")[0].partition(" ")[0] for line in collector.page().splitlines() if line[:1] != "#"}


def test_the_metrics_to_watch_are_there_by_their_documented_names(tmp_path: Path) -> None:
    """A queue is full, and what is in it is not wanted; a trace is too large for the sampling."""
    section = (FOLDER.parent / "docs/collector.md").read_text().partition("## Watching it")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(otelcol_\w+)`", section))
    assert len(documented) > 10
    folders = [tmp_path / name for name in ("local", "gateway")]
    for folder in folders:
        folder.mkdir()
    with backend() as store, collecting("local", folders[0], store, {"QUEUE_BYTES": "6000"}) as collector:
        store.stop()
        until(lambda: not collector.send(spans_of(*({} for _ in range(20)))), "a full queue", 20)
        store.http_status = 400
        store.start()
        until(lambda: sample_sum(collector.page(), "otelcol_exporter_send_failed_spans_total") > 0, "a failure", 20)
        found = sample_names(collector)
        assert sample_sum(collector.page(), "otelcol_receiver_refused_spans_total") == 20
        assert sample_sum(collector.page(), "otelcol_exporter_enqueue_failed_spans_total") == 20
    with backend() as store, collecting("gateway", folders[1], store, {"TRACE_MAX_BYTES": "2000"}) as collector:
        assert collector.send(spans_of({"name": "ingress"}, {"attributes": {"note": "x" * 3000}}))
        sampling = "otelcol_processor_tail_sampling"
        until(lambda: sample_sum(collector.page(), f"{sampling}_traces_dropped_too_large_total") == 1, "a drop", 20)
        until(lambda: sample_sum(collector.page(), f"{sampling}_global_count_traces_sampled_total") == 1, "one", 20)
        found |= sample_names(collector)
    assert documented - found == set()
