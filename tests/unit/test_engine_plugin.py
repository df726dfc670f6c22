"""The plugin on a scheduler and an output processor that behave as vLLM's, in one process."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import UNSAMPLED, EventType, Output, Outputs, Reason, Request, Scheduler, Status, Step
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmtrace.engine import collector, compat, drops, frontend, loads, meters, plugin
from llmtrace.engine.facts import FACTS_HEADER, MAX_CHUNKS
from llmtrace.engine.frontend import Frontend, external_id
from llmtrace.engine.hooks import Guard, wrap
from llmtrace.engine.switch import switch_on, traces_endpoint
from llmtrace.semconv import attributes as names

HOOK_NAMES = ("add_request", "schedule", "update_from_output", "finish_requests", "do_tracing", "process_outputs")


class Processor:
    """vLLM's OutputProcessor: forgets aborted requests, makes llm_request for the others."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.seen: list[str] = []

    def process_outputs(self, engine_core_outputs: list[Output], timestamp: float = 0.0) -> None:
        for output in engine_core_outputs:
            self.seen.append(output.request_id)
            state = self.request_states.get(output.request_id)
            if state is not None and (output.finish_reason is not None or state.stop_string):
                del self.request_states[output.request_id]
                self.do_tracing(output, state, None)

    def do_tracing(self, engine_core_output: Output, req_state: Any, iteration_stats: Any) -> None:
        context = TraceContextTextMapPropagator().extract(engine_core_output.trace_headers or {})
        tracer = trace.get_tracer("vllm")
        tracer.start_span("llm_request", context, kind=SpanKind.SERVER, start_time=1).end()


class World:
    """An engine core and an API server with the plugin in both."""

    def __init__(self, sampler: Sampler = ALWAYS_ON, queue_size: int = 100) -> None:
        self.now = 10.0
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.guard = Guard()
        self.frontend = Frontend(self.guard, queue_size)
        self.plugin = plugin.Plugin(self.guard, self.frontend)

        class WrappedScheduler(Scheduler):
            add_request = Scheduler.add_request
            schedule = Scheduler.schedule
            update_from_output = Scheduler.update_from_output
            finish_requests = Scheduler.finish_requests

        class WrappedProcessor(Processor):
            process_outputs = Processor.process_outputs
            do_tracing = Processor.do_tracing

        for name, (before, after) in self.plugin.bodies().items():
            for owner in (WrappedScheduler, WrappedProcessor):
                if name in HOOK_NAMES and hasattr(owner, name):
                    wrap(owner, name, self.guard, before, after)
        self.scheduler = WrappedScheduler()
        self.processor = WrappedProcessor()

    def add(self, request: Request, at: float = 10.0, **state: Any) -> Request:
        self.now = at
        request.record(EventType.QUEUED, at)
        self.processor.request_states[request.request_id] = SimpleNamespace(
            external_req_id="cmpl-1", num_cached_tokens=128, stop_string=False, **state
        )
        self.scheduler.add_request(request)
        return request

    def step(
        self,
        tokens: dict[str, int],
        at: float,
        new: tuple[str, ...] = (),
        resumed: tuple[str, ...] = (),
        preempted: tuple[str, ...] = (),
        model_output: Any = None,
        outputs: tuple[Output, ...] = (),
        done_at: float | None = None,
        **scheduled: Any,
    ) -> None:
        """One turn of the engine's loop; ``outputs`` are what vLLM sends to the API server."""
        for name, kind in [
            (new, EventType.SCHEDULED),
            (resumed, EventType.SCHEDULED),
            (preempted, EventType.PREEMPTED),
        ]:
            for request_id in name:
                self.scheduler.requests[request_id].record(kind, at)
        self.now = at
        step = Step(
            tokens,
            [SimpleNamespace(req_id=request_id) for request_id in new],
            set(preempted),
            **scheduled,
        )
        self.scheduler.steps.append(step)
        assert self.scheduler.schedule() is step
        if outputs:
            self.scheduler.messages = {0: Outputs(list(outputs), done_at or at + 0.05)}
        messages = self.scheduler.update_from_output(step, model_output or SimpleNamespace(kv_connector_output=None))
        for message in messages.values():
            self.processor.process_outputs(message.outputs, message.timestamp)

    def out(self, request: Request, tokens: int = 1, finish: Status | None = None) -> Output:
        reason = None
        if finish is not None:
            request.status = finish
            reason = request.get_finished_reason()
        return Output(request.request_id, [7] * tokens, reason, request.trace_headers)

    def spans(self) -> list[ReadableSpan]:
        self.frontend.flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm.v1.engine")
    module.EngineCoreOutput = Output  # type: ignore[attr-defined]
    module.EngineCoreOutputs = Outputs  # type: ignore[attr-defined]
    module.FinishReason = Reason  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", module)


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch, fake_vllm: None) -> Callable[..., World]:
    def make(*args: Any, **kwargs: Any) -> World:
        world = World(*args, **kwargs)
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: world.provider)
        for module in (collector, loads, plugin):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.now))
        return world

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> Iterator[World]:
    world = make_world()
    yield world
    assert world.guard.on, "a hook failed"


def by_name(spans: list[ReadableSpan]) -> dict[str, ReadableSpan]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def finish_normally(world: World, request: Request) -> None:
    name = request.request_id
    request.is_prefill_chunk = True
    world.step({name: 200}, 10.1, new=(name,))
    request.is_prefill_chunk = False
    world.step({name: 100, "other": 1}, 10.2, outputs=(world.out(request),))
    world.step({name: 1, "other": 1}, 10.3, outputs=(world.out(request, 2),), done_at=10.8)
    request.num_computed_tokens = request.num_tokens = 303
    world.step({name: 1}, 10.9, outputs=(world.out(request, 1, Status.FINISHED_STOPPED),), done_at=11.0)


def test_request_from_queue_to_end(world: World) -> None:
    world.scheduler.counts = (1, 3)
    finish_normally(world, world.add(Request("cmpl-1-89abcdef", num_prompt_tokens=300)))
    spans = by_name(world.spans())
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    request = spans["llm_request"]
    assert request.context is not None
    assert attributes(request) == {names.FINISH_REASONS: ("stop",), names.CACHED_TOKENS: 128}
    for name in ("queue", "prefill", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == request.context.span_id
        assert attributes(spans[name])[names.REQUEST_ID] == "cmpl-1"
        assert attributes(spans[name])[names.DP_RANK] == 2
        assert attributes(spans[name])[names.ENGINE_ID] == "engine-a"
    assert attributes(spans["queue"])[names.QUEUE_POSITION] == 3
    assert attributes(spans["prefill"])[names.PREFILL_CHUNKS] == 2
    chunks = [event for event in spans["prefill"].events if event.name == names.CHUNK_EVENT]
    assert [dict(event.attributes or {}) for event in chunks] == [
        {names.CHUNK_TOKENS: 200, names.CHUNK_BATCH_REQUESTS: 0, names.CHUNK_BATCH_TOKENS: 0},
        {names.CHUNK_TOKENS: 100, names.CHUNK_BATCH_REQUESTS: 1, names.CHUNK_BATCH_TOKENS: 1},
    ]
    decode = attributes(spans["decode"])
    assert decode[names.OUTPUT_TOKENS] == 4
    assert decode[names.TOKEN_GAP_MAX] == pytest.approx(550)
    assert decode[names.TPOT_MEAN] == pytest.approx(250)
    assert decode[names.KV_CACHE_BLOCKS] == 3


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": UNSAMPLED}])
def test_nothing_for_unsampled(world: World, headers: dict[str, str] | None) -> None:
    request = world.add(Request("r", headers))
    finish_normally(world, request)
    assert [span.name for span in world.spans()] == ["llm_request"]
    assert not world.scheduler._llmtrace_collector._live
    assert world.frontend._thread is None


def test_vllms_sampler_is_obeyed(make_world: Callable[..., World]) -> None:
    world = make_world(ALWAYS_OFF)
    finish_normally(world, world.add(Request("r")))
    assert world.spans() == []


def test_children_end_with_vllms_span(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends a little before the plugin sees it."""

    def do_tracing(_self: Processor, output: Output, _state: Any, _stats: Any) -> None:
        context = TraceContextTextMapPropagator().extract(output.trace_headers or {})
        trace.get_tracer("vllm").start_span("llm_request", context, kind=SpanKind.SERVER, start_time=1).end(5)

    wrapped = type(world.processor)
    monkeypatch.setattr(wrapped, "do_tracing", do_tracing)
    before, after = world.plugin.bodies()["do_tracing"]
    wrap(wrapped, "do_tracing", world.guard, before, after)
    finish_normally(world, world.add(Request("r")))
    spans = world.spans()
    assert len(spans) == 4
    assert {span.end_time for span in spans} == {5}


def test_children_of_n_and_prompt_lists_stay_with_their_own_request(world: World) -> None:
    requests = [world.add(Request(f"{index}_cmpl-1-89abcdef")) for index in range(3)]
    for request in requests:
        finish_normally(world, request)
    spans = world.spans()
    parents = {span.context.span_id for span in spans if span.name == "llm_request" and span.context}
    assert len(parents) == 3
    for name in ("queue", "prefill", "decode"):
        assert {span.parent.span_id for span in spans if span.name == name and span.parent} == parents
        assert len([span for span in spans if span.name == name]) == 3


def test_aborted_by_the_client(world: World) -> None:
    """vLLM makes no llm_request: the plugin does, once, with what happened until then."""
    request = world.add(Request("cmpl-9-89abcdef"))
    world.step({"cmpl-9-89abcdef": 200}, 10.1, new=("cmpl-9-89abcdef",))
    del world.processor.request_states[request.request_id]
    world.scheduler.finish_requests({request.request_id}, Status.FINISHED_ABORTED)
    world.scheduler.finish_requests([request.request_id], Status.FINISHED_ABORTED)
    world.step({}, 10.2, finished_req_ids={request.request_id})
    world.step({}, 10.3)
    spans = by_name(world.spans())
    assert set(spans) == {"llm_request", "queue", "prefill"}
    assert attributes(spans["llm_request"])[names.REQUEST_ID] == "cmpl-9"
    assert attributes(spans["llm_request"])[names.FINISH_REASONS] == ("abort",)
    assert spans["llm_request"].kind is SpanKind.SERVER
    assert spans["llm_request"].parent is not None
    assert f"{spans['llm_request'].parent.span_id:x}" == "b7ad6b7169203331"
    assert [event.name for event in spans["prefill"].events][-1] == names.ABORT_EVENT
    assert world.processor.seen == [], "vLLM sees no message that is not its own"


def test_stop_string_found_by_the_api_server(world: World) -> None:
    """llm_request comes before the engine knows; the facts follow with its abort."""
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",), outputs=(world.out(request),))
    world.processor.request_states["r"].stop_string = True
    world.step({"r": 1}, 10.2, outputs=(world.out(request),))
    world.scheduler.finish_requests(iter(["r"]), Status.FINISHED_ABORTED)
    world.step({}, 10.3, finished_req_ids={"r"})
    spans = by_name(world.spans())
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    assert attributes(spans["llm_request"])[names.FINISH_REASONS] == ("stop",)
    assert attributes(spans["decode"])[names.FINISH_REASONS] == ("stop",)
    assert attributes(spans["decode"])[names.OUTPUT_TOKENS] == 2
    assert not world.frontend._pending


@pytest.mark.parametrize("hung_up", [True, False])
def test_ended_in_the_engine_while_its_abort_was_on_the_way(world: World, hung_up: bool) -> None:
    """vLLM ignores the last output of a request that it has given up already; its facts are used all the same."""
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",), outputs=(world.out(request),))
    if hung_up:
        del world.processor.request_states["r"]
    else:
        world.processor.request_states["r"].stop_string = True
        world.step({"r": 1}, 10.2, outputs=(world.out(request),))
    world.step({"r": 1}, 10.3, outputs=(world.out(request, 1, Status.FINISHED_STOPPED),))
    world.scheduler.finish_requests(["r"], Status.FINISHED_ABORTED)
    world.step({}, 10.4)
    spans = by_name(world.spans())
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    reason = "abort" if hung_up else "stop"
    assert attributes(spans["llm_request"])[names.FINISH_REASONS] == (reason,)
    assert attributes(spans["decode"])[names.FINISH_REASONS] == (reason,)


def test_failed_in_the_engine(world: World) -> None:
    """update_from_output ends the request by finish_requests and sends an output itself."""
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",))
    world.scheduler.finish_requests({"r"}, Status.FINISHED_ERROR)
    world.step({}, 10.2, outputs=(Output("r", [], Reason.ERROR, request.trace_headers),))
    spans = by_name(world.spans())
    assert set(spans) == {"llm_request", "queue", "prefill"}
    assert not spans["prefill"].status.is_ok
    assert attributes(spans["llm_request"])[names.FINISH_REASONS] == ("error",)


def test_preempted_and_resumed(world: World) -> None:
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",), outputs=(world.out(request),))
    world.step({"other": 1}, 10.3, preempted=("r",))
    world.step({"r": 301}, 10.7, resumed=("r",), outputs=(world.out(request),))
    world.step({"r": 1}, 10.8, outputs=(world.out(request, 1, Status.FINISHED_STOPPED),))
    decode = by_name(world.spans())["decode"]
    assert [event.name for event in decode.events] == ["preempted", "resumed", "prefill_chunk"]
    assert attributes(decode)[names.PREEMPTIONS] == 1
    assert attributes(decode)[names.PREEMPTED_TIME] == pytest.approx(400)


def test_remote_kv(world: World) -> None:
    world.scheduler.connector = object()
    request = world.add(Request("r", kv_transfer_params={"remote_engine_id": "prefiller"}), at=10.0)
    request.prefill_stats.num_external_cached_tokens = 172
    request.status = Status.WAITING_FOR_REMOTE_KVS
    world.step({}, 10.02)
    received = SimpleNamespace(finished_recving={"r"}, failed_recving=set())
    world.step({}, 10.06, model_output=SimpleNamespace(kv_connector_output=received))
    world.scheduler.finished_recving_kv_req_ids = {"r"}
    world.step({}, 10.07)
    request.status = Status.RUNNING
    world.step({"r": 1}, 10.1, new=("r",), outputs=(world.out(request),))
    world.step({"r": 1}, 10.2, outputs=(world.out(request, 1, Status.FINISHED_STOPPED),))
    spans = world.spans()
    assert [span.name for span in spans if span.name != "llm_request"] == [
        "queue",
        "kv_load",
        "queue",
        "prefill",
        "decode",
    ]
    load = next(span for span in spans if span.name == "kv_load")
    assert (load.end_time or 0) - (load.start_time or 0) == pytest.approx(40_000_000, abs=1000)
    assert attributes(load)[names.KV_LOAD_TOKENS] == 172
    assert attributes(load)[names.KV_LOAD_REMOTE_ENGINE] == "prefiller"


def test_speculative_decoding(world: World) -> None:
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",), outputs=(world.out(request),))
    model_output = SimpleNamespace(kv_connector_output=None, sampled_token_ids=[[1, 2, 3]], req_id_to_index={"r": 0})
    world.step(
        {"r": 5},
        10.2,
        outputs=(world.out(request, 3, Status.FINISHED_STOPPED),),
        model_output=model_output,
        scheduled_spec_decode_tokens={"r": [-1] * 4, "other": [-1]},
        num_invalid_spec_tokens={"r": 1},
    )
    decode = attributes(by_name(world.spans())["decode"])
    assert decode[names.DRAFT_TOKENS] == 3
    assert decode[names.ACCEPTED_TOKENS] == 2


def test_turn_of_a_streamed_input_is_not_the_end(world: World) -> None:
    request = world.add(Request("r"))
    world.step({"r": 300}, 10.1, new=("r",))
    turn = Output("r", [1], Reason.STOP, request.trace_headers)
    world.processor.request_states.clear()
    world.step({"r": 1}, 10.2, outputs=(turn,))
    assert FACTS_HEADER not in (turn.trace_headers or {})
    assert world.scheduler._llmtrace_collector._live


def test_long_prefill_keeps_some_chunks_and_counts_all(world: World) -> None:
    request = world.add(Request("r", is_prefill_chunk=True))
    world.step({"r": 1}, 10.0, new=("r",))
    for _ in range(MAX_CHUNKS + 10):
        world.step({"r": 1}, 10.0)
    request.is_prefill_chunk = False
    world.step({"r": 1}, 10.0, outputs=(world.out(request, 1, Status.FINISHED_STOPPED),))
    prefill = by_name(world.spans())["prefill"]
    assert attributes(prefill)[names.PREFILL_CHUNKS] == MAX_CHUNKS + 12
    assert len(prefill.events) == MAX_CHUNKS + 1


def test_several_api_servers(world: World) -> None:
    """Facts of an aborted request go to the API server that has it."""
    world.add(Request("r", client_index=3))
    world.scheduler.finish_requests("r", Status.FINISHED_ABORTED)
    step = Step({})
    world.scheduler.steps.append(step)
    world.scheduler.schedule()
    messages = world.scheduler.update_from_output(step, SimpleNamespace())
    assert list(messages) == [3]
    assert [output.request_id for output in messages[3].outputs] == ["r"]


def test_full_queue_drops_and_counts(make_world: Callable[..., World], caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(queue_size=1)
    world.frontend._thread = SimpleNamespace(is_alive=lambda: False)  # type: ignore[assignment]
    for index in range(4):
        finish_normally(world, world.add(Request(f"r{index}")))
    assert world.frontend.dropped == 3
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1


def test_drops_are_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: provider)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}
    assert meters.provider(environment) is provider, "the process has one"
    drops.publish(lambda: 3, environment)
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert metric.name == names.ENGINE_DROPPED_METRIC
    assert [point.value for point in metric.data.data_points] == [3]


def test_drops_of_steps_are_a_metric_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: provider)
    drops.publish_steps(lambda: 3, {names.WORLD_RANK: 7, names.NODE: "n0"}, {})
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert metric.name == names.STEPS_DROPPED_METRIC
    (point,) = metric.data.data_points
    assert (point.value, point.attributes) == (3, {names.WORLD_RANK: 7, names.NODE: "n0"})


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, False),
    ],
)
def test_own_meter_provider_only_where_metrics_go(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], own: bool
) -> None:
    made = MeterProvider()
    monkeypatch.setattr(meters, "_own_provider", lambda: made)
    assert (meters.provider(environment) is made) is own


def test_pending_is_bounded(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.frontend._pending_size = 2
    for index in range(4):
        request = world.add(Request(f"r{index}"))
        world.processor.request_states[request.request_id].stop_string = True
        world.step({f"r{index}": 300}, 10.1, new=(f"r{index}",), outputs=(world.out(request),))
    assert len(world.frontend._pending) == 2
    assert world.frontend.dropped == 2


@pytest.mark.parametrize("place", ["waiting_count", "added", "scheduled", "stepped", "updated", "ended"])
def test_fault_in_the_engine_core_switches_off_and_the_request_goes_on(
    make_world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("the prompt was: secret")

    monkeypatch.setattr(collector.Collector, place, fail)
    check_fault(make_world(), caplog)


@pytest.mark.parametrize("place", ["tracing", "traced", "receive", "_watch._seen"])
def test_fault_in_the_api_server_switches_off_and_the_request_goes_on(
    make_world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("the prompt was: secret")

    if place == "_watch._seen":
        monkeypatch.setattr(frontend.RequestSpanWatch, "_seen", fail)
    else:
        monkeypatch.setattr(Frontend, place, fail)
    check_fault(make_world(), caplog)


def test_off_in_the_middle_of_a_request_touches_no_later_span(
    make_world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread may switch the plugin off while this one waits for llm_request."""
    world = make_world()
    world.frontend.tracing(world.out(Request("r")), SimpleNamespace(num_cached_tokens=1))
    world.guard.run("elsewhere", lambda: 1 / 0)
    finish_normally(world, world.add(Request("later")))
    (span,) = world.spans()
    assert attributes(span) == {}


def test_fault_while_making_spans(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_job: object) -> None:
        raise RuntimeError("the prompt was: secret")

    monkeypatch.setattr(frontend, "_make", fail)
    check_fault(make_world(), caplog)


def check_fault(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for index in range(2):
            finish_normally(world, world.add(Request(f"r{index}")))
            world.add(Request(f"aborted{index}"))
            world.scheduler.finish_requests([f"aborted{index}"], Status.FINISHED_ABORTED)
            del world.processor.request_states[f"aborted{index}"]
        world.step({}, 12.0)
        spans = world.spans()
    assert [span.name for span in spans if span.parent and f"{span.parent.span_id:x}" == "b7ad6b7169203331"].count(
        "llm_request"
    ) >= 2
    assert not world.guard.on
    lines = [record.getMessage() for record in caplog.records if "llmtrace" in record.getMessage()]
    assert len(lines) == 1
    assert "RuntimeError" in lines[0]
    assert "secret" not in caplog.text
    assert not world.scheduler._llmtrace_collector._live if hasattr(world.scheduler, "_llmtrace_collector") else True


def test_vllms_own_exceptions_pass() -> None:
    class Thing:
        def method(self, number: int) -> int:
            if number < 0:
                raise ValueError("vLLM's own")
            return number

    seen: list[Any] = []
    guard = Guard()
    wrap(Thing, "method", guard, lambda _self, number: number + 1, lambda *args: seen.append(args[:2]))
    wrap(Thing, "method", guard, lambda _self, number: number + 1, lambda *args: seen.append(args[:2]))
    assert Thing().method(1) == 1
    with pytest.raises(ValueError, match="vLLM's own"):
        Thing().method(-1)
    assert seen == [(2, 1)]
    assert guard.on
    assert Thing.method.__name__ == "method"


@pytest.mark.parametrize(
    ("internal", "external"),
    [
        ("cmpl-x-0-89abcdef", "cmpl-x-0"),
        ("1_chatcmpl-x-89abcdef", "chatcmpl-x"),
        ("chatcmpl-x", "chatcmpl-x"),
        ("89abcdef", "89abcdef"),
    ],
)
def test_external_id(internal: str, external: str) -> None:
    assert external_id(internal) == external


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "http://c:4317"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://c:4318/v1/traces",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:4318/x",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            "http://t:4318/x",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_endpoint_from_variables(environment: dict[str, str], endpoint: str | None) -> None:
    assert traces_endpoint(environment) == endpoint


def test_switch(caplog: pytest.LogCaptureFixture) -> None:
    def config(flag: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=flag))

    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    plain, flagged, blind = config(), config("http://flag:1"), config()
    switch_on(plain, environment=environment)
    switch_on(flagged, environment=environment)
    switch_on(blind, log_stats=False, environment=environment)
    assert plain.observability_config.otlp_traces_endpoint == "http://c:4317"
    assert flagged.observability_config.otlp_traces_endpoint == "http://flag:1"
    assert blind.observability_config.otlp_traces_endpoint is None
    assert "disable-log-stats" in caplog.text
    assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "grpc"


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_a_protocol_that_would_keep_vllm_from_starting_switches_nothing_on(
    caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None))
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", name: "http/json"}
    switch_on(config, environment=environment)
    assert config.observability_config.otlp_traces_endpoint is None
    assert environment[name] == "http/json"
    assert "vLLM speaks grpc and http/protobuf only" in caplog.text


class Owner:
    def same(self, request: object, extra: int = 0) -> None: ...
    def changed(self, other: object) -> None: ...


def hook(function: str) -> compat.Hook:
    return compat.Hook(function, __name__, "Owner", function, ("request",), "reason", f"what {function} gives")


def test_check_says_what_moved(caplog: pytest.LogCaptureFixture) -> None:
    gone_module = compat.Hook("m", "no.such.module", "Owner", "m", (), "reason", "what m gives")
    found, moved = compat.check((hook("same"), hook("changed"), hook("gone"), gone_module))
    assert set(found) == {"same"}
    assert [item.entry.path.rsplit(".", 1)[1] for item in moved] == ["changed", "gone", "m"]
    plugin.report("9.9", moved)
    assert len(caplog.records) == 1
    for text in ("9.9", "Owner.changed (its parameters are now other)", "Owner.gone", "what gone gives"):
        assert text in caplog.text


def test_untried_version_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plugin.report("0.32.1", [])
        assert not caplog.records
        plugin.report("9.9.0", [])
    assert len(caplog.records) == 1


def test_every_hook_has_a_body() -> None:
    each = plugin.Plugin()
    assert {*each.bodies(), *each.step_bodies()} == {item.name for item in compat.HOOKS}


def test_without_vllm_register_says_so_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrace import engine

    monkeypatch.setattr(plugin, "_installed", [])
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine.register()


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it, and what it takes from the kit's own packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = module.split(".")[0] == "llmtrace"
            yield from (f"{module}.{alias.name}" if inside else module for alias in node.names)


def test_imports_nothing_but_opentelemetry_vllm_and_the_constants() -> None:
    """It goes into other people's images."""
    found = {name for path in Path(plugin.__file__).parent.glob("*.py") for name in imported(path)}
    own = {name for name in found if name.startswith("llmtrace.") and not name.startswith("llmtrace.engine.")}
    assert own == {"llmtrace.__version__", "llmtrace.semconv.attributes"}
    others = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert others == {"llmtrace", "opentelemetry", "vllm"}


ALONE = """
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # importing one of these fails
import llmtrace.engine
for module in pkgutil.iter_modules(llmtrace.engine.__path__):
    importlib.import_module("llmtrace.engine." + module.name)
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "llmtrace"]))
"""


def base_install() -> set[str]:
    """The distributions of ``pip install llmtrace``: those that it requires without an extra, and theirs."""
    found: set[str] = set()
    left = ["llmtrace"]
    while left:
        name = canonicalize_name(left.pop())
        if name not in found:
            found.add(name)
            wanted = [Requirement(text) for text in metadata.requires(name) or ()]
            left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_loads_where_there_is_only_the_base_install() -> None:
    """Every module of it, in a Python of its own that cannot import what only the kit's extras bring."""
    base = base_install()
    blocked = [
        package
        for package, owners in metadata.packages_distributions().items()
        if not base.intersection(map(canonicalize_name, owners))
    ]
    assert {"pydantic", "yaml", "httpx"} <= set(blocked)
    command = [sys.executable, "-c", ALONE, *blocked]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    loaded = set(json.loads(ran.stdout))
    assert {"llmtrace.engine.plugin", "llmtrace.engine.collector", "llmtrace.engine.spans"} <= loaded
    others = {name for name in loaded if name != "llmtrace.engine" and not name.startswith("llmtrace.engine.")}
    assert others == {"llmtrace", "llmtrace.semconv", "llmtrace.semconv.attributes"}


def test_vllm_is_imported_only_when_it_is_there() -> None:
    """At module level vLLM is never imported: the package's tests and tools run without it."""
    for path in Path(plugin.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")), path
