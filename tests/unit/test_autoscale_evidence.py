"""What the store adds to a decision: its drivers, and the times of a model's load; and what a query counts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from example_scaling import MODEL, REPORTS, SECOND, decision_trace, ns, record, request, starts, stops

from llmtrace.autoscale import evidence
from llmtrace.autoscale.evidence import MOST_LINKS, Drivers, drained, drivers, first_token, refine
from llmtrace.autoscale.record import DecisionRecord, MetricRecord, ReplicaRecord
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Demand, Part, Stay, Unit, demand, stay
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.tempo import PAGE, TraceSummary


@dataclass
class Store:
    """A store with these traces; it finds by span name, model, instance and time, as asked."""

    traces: list[Trace]
    read: list[str] = field(default_factory=list)

    def search(self, q: str, *, start_s: int, end_s: int, limit: int) -> list[TraceSummary]:
        name = re.search(r'name = "([^"]+)"', q)
        model = re.search(rf'span\.{a.TARGET_MODEL} = "([^"]+)"', q)
        instance = re.search(r'resource\.service\.instance\.id = "([^"]+)"', q)
        endpoint = re.search(rf'span\.{a.ENDPOINT_NAME} = "([^"]+)"', q)
        assert limit <= PAGE
        found = []
        for trace in self.traces:
            first, last = min(s.start_ns for s in trace.spans), max(s.end_ns for s in trace.spans)
            fits = any(
                (
                    (not name or s.name == name[1])
                    and (not model or s.attributes.get(a.TARGET_MODEL) == model[1])
                    and (not instance or instance[1] in (s.instance, s.resource.get("k8s.pod.name")))
                )
                or (endpoint and s.attributes.get(a.ENDPOINT_NAME) == endpoint[1])
                for s in trace.spans
            )
            if fits and first < (end_s + 1) * SECOND and last >= start_s * SECOND:
                took = (last - first) // 1_000_000
                found.append(TraceSummary(trace.trace_id, "", "", first, took, 1))
        return found[:limit]

    def trace(self, trace_id: str) -> Trace | None:
        self.read.append(trace_id)
        return next((t for t in self.traces if t.trace_id == trace_id), None)


def store(*traces: Trace) -> Any:
    return Store(list(traces))


def stays(kept: Any, decision: DecisionRecord) -> tuple[Stay, ...]:
    """The drivers of a decision, all of which were read."""
    found = drivers(kept, decision)
    assert found is not None
    assert found.unread == 0
    return found.stays


TOKENS = '{namespace="llm-d", producer_name="inflight-load-producer"}'
WORKAROUND = (
    f'label_replace(llm_d_epp_inflight_tokens{TOKENS}, "target_pod", "$1", "endpoint_name", "(.+)") and on (target_pod)'
    ' label_replace(llm_d_epp_per_endpoint_queue_size, "target_pod", "$1", "model_server_endpoint", "(.+)")'
)
PREDICTED = "histogram_quantile(0.9, sum(rate(llm_d_epp_request_predicted_ttft_seconds_bucket[1m])) by (le)) / 3"


def test_the_drivers_are_those_that_waited_in_the_window() -> None:
    kept = store(
        request(1, 10, wait=20),  # waits through the window
        request(2, 15, wait=14.5),  # until its middle
        request(3, 10, wait=17),  # until before it
        request(4, 31, wait=5),  # from after it
        request(5, 10, wait=20, kind="chats"),  # of a model that the query does not count
        request(6, 29.5, wait=0, run=9),  # runs, and never waited
    )
    found = stays(kept, record(30, 1, 3, 2.0))
    assert [int(s.trace_id, 16) for s in found] == [1, 2]
    assert {int(i, 16) for i in kept.read} == {1, 2, 6}  # nothing else is even read
    assert found[0].span_id == f"{2:016x}"  # that of gateway.request


def test_a_decision_whose_time_is_cut_to_seconds_was_driven_until_its_second_was_over() -> None:
    kept = store(request(1, 30.4, wait=5), request(2, 31.2, wait=5))
    assert stays(kept, record(30, 1, 3, 2.0)) == ()
    found = stays(kept, record(30, 1, 3, 2.0, resolution_ms=1000.0))
    assert [int(s.trace_id, 16) for s in found] == [1]


def test_a_decision_without_a_metric_has_no_drivers() -> None:
    assert drivers(store(request(1, 10, wait=20)), record(30, 1, 1, None, metric=None)) == Drivers()


def test_a_decision_says_how_many_drove_it_and_that_links_and_reading_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MOST_READ", 40)
    kept = store(*(request(n, 30 - n / 10, wait=n / 5) for n in range(1, 51)))
    found = drivers(kept, record(30, 1, 3, 50.0))
    assert found is not None
    # Read were those that lasted longest.
    assert [int(s.trace_id, 16) for s in found.stays] == list(range(50, 10, -1))
    root = decision_trace(record(30, 1, 3, 50.0), found).roots[0]
    assert [root.attributes[k] for k in (a.DRIVERS_FOUND, a.DRIVERS_LINKED, a.DRIVERS_UNREAD)] == [40, MOST_LINKS, 10]
    assert [int(link.trace_id, 16) for link in root.links] == list(range(50, 50 - MOST_LINKS, -1))


def handled(number: int, at: float, end: float, *, endpoint: str = "", failed: bool = False, pods: Any = ()) -> Trace:
    """A request at the gateway, which sent it to an endpoint, and the pods with a span of it; True: one that failed."""
    trace_id = f"{number:032x}"

    def span(n: int, name: str, error: bool, resource: dict[str, str], **attributes: str) -> Span:
        return Span(
            trace_id, f"{n:016x}", None, name, "SERVER", ns(at), ns(end),
            status="ERROR" if error else "UNSET", attributes=attributes, resource=resource,
        )  # fmt: skip

    told = {a.ENDPOINT_NAME: endpoint} if endpoint else {}
    spans = [span(1, a.GATEWAY_SPAN, failed, {"service.name": a.PICKER_SERVICE}, **told)]
    for n, (pod, error) in enumerate(pods, 2):
        spans.append(span(n, a.SERVER_SPAN, error, {"service.name": "vllm", "k8s.pod.name": pod}))
    return Trace(trace_id, tuple(spans))


def test_requests_on_a_pod_that_was_stopped_are_counted_by_their_traces() -> None:
    kept = store(
        handled(1, 45, 55, pods=[("vllm-1", False)]),  # finished while it drained
        handled(2, 45, 58, failed=True, pods=[("vllm-1", True)]),
        handled(3, 45, 58, failed=True, endpoint="llm-d/vllm-1"),  # the server was killed, and sent nothing
        handled(4, 45, 70, pods=[("vllm-1", True), ("vllm-0", False)]),  # a gateway tried again elsewhere
        handled(5, 45, 49, failed=True, pods=[("vllm-1", True)]),  # before
        handled(6, 45, 58, failed=True, endpoint="llm-d/vllm-0", pods=[("vllm-0", True)]),  # another pod
    )
    drain = stops("vllm-1", 50, took=10)
    drain.running = drain.cut = None
    drained(kept, drain, "llm-d")
    assert (drain.running, drain.cut, drain.moved, drain.outcome) == (4, 2, 1, a.OUTCOME_CUT)
    (span,) = decision_trace(record(50, 2, 1, 0.0, replicas=[drain])).named(a.DRAIN_SPAN)
    assert [span.attributes[k] for k in (a.DRAIN_RUNNING, a.DRAIN_CUT, a.DRAIN_MOVED)] == [4, 2, 1]


def test_what_was_counted_on_the_spot_stays() -> None:
    drain = stops("vllm-1", 50, running=3)
    kept = store(handled(2, 45, 52, failed=True, pods=[("vllm-1", True)]))
    drained(kept, drain, "llm-d")
    assert (drain.running, drain.cut, drain.moved) == (3, 0, None)
    assert kept.read == []


def on(query: str) -> DecisionRecord:
    """A decision at 30 s on another metric."""
    metric = MetricRecord(name="m", query=query, target=1.5, target_type="AverageValue", value=3.0, proposal=2)
    return record(30, 1, 2, 3.0, metric="m", metrics=[metric])


def test_what_is_in_a_backlog_of_tokens_are_prompts_until_their_first_token_the_longest_first() -> None:
    kept = store(
        request(1, 25, wait=0, run=20, ttft=8, tokens=110),  # prefilled through the window
        request(2, 25, wait=0, run=20, ttft=6, tokens=5010),  # the same, of more tokens
        request(3, 20, wait=0, run=20, ttft=5, tokens=9010),  # done before it
        request(4, 25, wait=20, tokens=9010),  # waits: no server has it yet
    )
    found = stays(kept, on(f"(sum(llm_d_epp_inflight_tokens{TOKENS}) / 15928) or vector(0)"))
    assert [(int(s.trace_id, 16), s.prompt_tokens) for s in found] == [(2, 5000), (1, 100)]


def test_saturation_is_due_to_what_the_servers_have_and_not_to_what_waits_for_them() -> None:
    kept = store(request(1, 25, wait=0, run=20), request(2, 25, wait=20), request(3, 25, wait=0, run=9, kind="chats"))
    found = stays(kept, on('max(llm_d_epp_flow_control_pool_saturation{inference_pool="p"})'))
    assert [int(s.trace_id, 16) for s in found] == [1, 3]


def test_where_nobody_can_tell_the_decision_claims_no_number() -> None:
    kept = store(request(1, 10, wait=40))
    decision = on("slo:saturation:smoothed")
    assert drivers(kept, decision) is None
    assert kept.read == []
    root = decision_trace(decision, None).roots[0]
    assert a.DRIVERS_FOUND not in root.attributes
    assert root.links == ()


def startup(name: str, loading: float, done: float) -> Trace:
    resource = {"service.name": "vllm", "service.instance.id": name}
    times = ((a.VLLM_CORE_SPAN, 26.0, done), (a.VLLM_LOADING_CPU_SPAN, loading, loading + 1))
    spans = tuple(
        Span("c" * 32, f"{n:016x}", None, what, "INTERNAL", ns(start), ns(end), resource=resource)
        for n, (what, start, end) in enumerate(times, 1)
    )
    return Trace("c" * 32, spans)


def test_vllms_own_spans_tell_when_the_model_was_loaded() -> None:
    replica = starts("vllm-1", 25)  # by its log: 10 s, 5 s, then 2 s until ready
    refine(store(startup("vllm-1", loading=34.2, done=39.1)), replica)
    seconds = [(p.name, (p.end_ns - p.start_ns) / SECOND, p.source) for p in replica.phases]
    assert seconds == [
        (a.CONTAINER_START_SPAN, pytest.approx(9.2), a.SOURCE_SPANS),
        (a.MODEL_LOAD_SPAN, pytest.approx(4.9), a.SOURCE_SPANS),
        (a.READY_SPAN, pytest.approx(2.9), a.SOURCE_LOG),
        (a.FIRST_REQUEST_SPAN, pytest.approx(1.0), a.SOURCE_LOG),
    ]
    assert all(
        before.end_ns == after.start_ns for before, after in zip(replica.phases, replica.phases[1:], strict=False)
    )


@pytest.mark.parametrize("trace", [startup("vllm-2", 34, 39), startup("vllm-1", 34, 90)])
def test_spans_of_another_replica_or_another_start_change_nothing(trace: Trace) -> None:
    replica = starts("vllm-1", 25)
    before = list(replica.phases)
    refine(store(trace), replica)
    assert replica.phases == before


def in_a_cluster() -> ReplicaRecord:
    """A pod that was decided on at 25 and ready at 42."""
    replica = ReplicaRecord(name="vllm-1", up=True, started_ns=ns(25))
    for phase, end in (
        (a.SCHEDULE_SPAN, 27),
        (a.IMAGE_PULL_SPAN, 30),
        (a.CONTAINER_START_SPAN, 31),
        (a.READY_SPAN, 42),
    ):
        replica.phase(phase, ns(end), a.SOURCE_CONDITIONS)
    return replica


def test_what_comes_before_the_container_stays_as_it_is() -> None:
    replica = in_a_cluster()
    refine(store(startup("vllm-1", 34, 39)), replica)
    assert [p.name for p in replica.phases] == [
        a.SCHEDULE_SPAN, a.IMAGE_PULL_SPAN, a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN, a.READY_SPAN,
    ]  # fmt: skip
    assert replica.phases[2].start_ns == ns(30)
    assert replica.phases[-1].end_ns == ns(42)


def served(number: int, pod: str, at: float, ttft: float) -> Trace:
    """A request that a pod served."""
    trace_id = f"{number:032x}"
    attributes = {a.VLLM_TTFT: ttft}
    span = Span(
        trace_id, f"{number:016x}", None, a.SERVER_SPAN, "SERVER", ns(at), ns(at + 5),
        attributes=attributes, resource={"service.name": "vllm", "k8s.pod.name": pod},
    )  # fmt: skip
    return Trace(trace_id, (span,))


def test_the_first_token_of_a_pod_is_that_of_the_request_that_gave_one_first() -> None:
    kept = store(
        served(1, "vllm-1", 70, 1.0),
        served(2, "vllm-1", 60, 4.0),
        served(3, "vllm-1", 61, 0.5),
        served(4, "vllm-0", 45, 0.1),
    )
    assert first_token(kept, in_a_cluster(), 60) == ns(61.5)


def test_a_pod_without_a_request_in_time_has_none() -> None:
    assert first_token(store(served(1, "vllm-0", 45, 0.1), served(2, "vllm-1", 120, 0.1)), in_a_cluster(), 60) is None


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (f'sum(llm_d_epp_flow_control_queue_size{{model_name="{REPORTS}"}})', Demand(Part.WAITING, REPORTS)),
        (
            'sum(llm_d_epp_request_running{job="picker",model_name="Qwen/Qwen3-32B"})',
            Demand(Part.RUNNING, "Qwen/Qwen3-32B"),
        ),
        ("max(llm_d_epp_flow_control_pool_saturation)", Demand(Part.RUNNING, None, Unit.LOAD)),
        (f"(sum(llm_d_epp_inflight_tokens{TOKENS}) / 15928) or vector(0)", Demand(Part.PREFILLING, None, Unit.TOKENS)),
        (f"sum({WORKAROUND})", Demand(Part.PREFILLING, None, Unit.TOKENS)),
        ("sum(llm_d_epp_inflight_requests)", Demand(Part.RUNNING)),
        ('sum(vllm:kv_cache_usage_perc{pod=~".*decode.*"}) or vector(0)', Demand(Part.RUNNING, None, Unit.LOAD)),
        ("sum(llm_d_epp_flow_control_queue_bytes)", Demand(Part.WAITING, None, Unit.LOAD)),
        (PREDICTED, Demand(None)),
        ("sum(rate(llm_d_epp_flow_control_request_queue_duration_seconds_count[1m]))", Demand(None)),
        ('composite-metric{scaledobject.keda.sh/name="vllm"}', Demand(None)),
        ('wva_desired_replicas{variant_name="v"}', Demand(None)),
        ("sum(inference_extension_flow_control_queue_size)", Demand(Part.WAITING)),
        ('sum(inference_objective_running_requests{target_model_name = "a\\"b"})', Demand(Part.RUNNING, 'a"b')),
        ("up", Demand(None)),
    ],
)
def test_what_a_query_counts(query: str, expected: Demand) -> None:
    assert demand(query) == expected


@pytest.mark.parametrize("queue_span", [True, False])
def test_a_stay_by_the_queues_span_or_by_the_gap(queue_span: bool) -> None:
    found = stay(request(1, 10, wait=4, run=2, kind="chats", queue_span=queue_span))
    assert found is not None
    assert (found.model, found.arrived_ns, found.dispatched_ns, found.ended_ns) == (MODEL, ns(10), ns(14), ns(16))
    assert found.first_token_ns == ns(14.05)  # by vLLM's span; the gateway says nothing


def test_a_request_that_was_never_dispatched_waited_until_its_end() -> None:
    whole = request(1, 10, wait=4, run=2)
    refused = Trace(whole.trace_id, tuple(s for s in whole.spans if s.name != a.PROFILE_SPAN))
    found = stay(refused)
    assert found is not None
    assert found.dispatched_ns == found.ended_ns == ns(16)


def test_other_traces_are_no_stay() -> None:
    assert stay(startup("vllm-1", 34, 39)) is None
