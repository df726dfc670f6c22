"""Steps of mixtures of experts: numbers, ids, phases, spans; on vLLM's shapes, in one process."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import SAMPLED, UNSAMPLED, Request, Scheduler, Step, Store
from hypothesis import given
from hypothesis import strategies as st
from loopback import until
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmtrace.engine.collector import Collector
from llmtrace.engine.facts import MAX_STEPS
from llmtrace.engine.hooks import Guard, wrap
from llmtrace.engine.plugin import Plugin
from llmtrace.engine.spans import phases as request_phases
from llmtrace.engine.steps import ids
from llmtrace.engine.steps.batch import ATTRIBUTE, MAX_LINKS, MOST_COUNTED, Batch, Batches
from llmtrace.engine.steps.demand import NONE, Demand, heard
from llmtrace.engine.steps.recorder import COMBINE, DISPATCH, EXPERTS, WAIT, Phases, Record, Recorder, phases
from llmtrace.engine.steps.sender import QUEUE_SIZE, Rank, Sender, attributes, node_name
from llmtrace.engine.steps.totals import MOST_EXPERT_SERIES, Totals
from llmtrace.engine.steps.worker import StepWorker, expert_tokens, is_wanted, rank_of
from llmtrace.semconv import attributes as names

WAIT_S = 30.0
RANK = Rank(world=1, ranks=2, dp=1, tp=0, ep=1, node="node-a", all2all="deepep_low_latency")


@pytest.fixture(autouse=True)
def _nothing_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heard, "group", "")
    monkeypatch.setattr(heard, "window", NONE)


class Clock:
    """Marks are milliseconds that the test sets; a device is as far as ``device`` says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.device = float("inf")
        self.looks = 0

    def mark(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        self.looks += 1
        return mark <= self.device

    def ms(self, start: float, end: float) -> float:
        return end - start


def moe_config(**parallel: Any) -> SimpleNamespace:
    described = {"data_parallel_rank": 1, "data_parallel_size": 2, "world_size": 2, "tensor_parallel_size": 2}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_index=1, enable_expert_parallel=True, all2all_backend="naive", **{**described, **parallel}
        ),
        observability_config=SimpleNamespace(otlp_traces_endpoint="http://collector:4317"),
        model_config=SimpleNamespace(is_moe=True),
        compilation_config=SimpleNamespace(mode=0),
        kv_transfer_config=None,
        instance_id="engine-a",
    )


def moe_scheduler(**requests: Request) -> Scheduler:
    scheduler = Scheduler()
    scheduler.vllm_config = moe_config()
    scheduler.requests = dict(requests)
    scheduler.counts = (2, 3)
    return scheduler


def engine(scheduler: Scheduler, store: Store) -> SimpleNamespace:
    """A data-parallel one, whose worker is in its own process."""
    executor = SimpleNamespace(collective_rpc=lambda method, args: method(None, *args))
    return SimpleNamespace(scheduler=scheduler, dp_store=store, model_executor=executor)


def joined(scheduler: Scheduler, every: str = "1") -> Batches:
    """Of an engine that comes second: its group has the name ``g``."""
    batches = Batches(scheduler, Guard(), {ids.EVERY_VARIABLE: every})
    batches.join(engine(scheduler, Store(**{"llmtrace/step-group": b"g"})))
    return batches


def batch_of(step: Any) -> Batch | None:
    """What workers are told of a step, if it is traced."""
    told = getattr(step, ATTRIBUTE, ())
    return Batch(*told) if len(told) > 2 else None


def scheduled(batches: Batches, tokens: dict[str, int]) -> Any:
    step = Step(tokens)
    batches.scheduled(step)
    return step


# Numbers and ids.


def test_ids_follow_from_group_number_and_rank() -> None:
    assert ids.trace_id("g", 7) == ids.trace_id("g", 7)
    assert len({ids.trace_id(g, n) for g in "gh" for n in range(50)}) == 100
    assert len({ids.span_id("g", n, r) for n in range(20) for r in range(20)}) == 400
    assert 0 < ids.trace_id("g", 7) < 1 << 128
    assert 0 < ids.span_id("g", 7, 1) < 1 << 64


def test_ranks_agree_on_their_group_and_another_start_is_another_group() -> None:
    store = Store()
    assert ids.agree(store) == ids.agree(store) != ids.agree(Store())


@pytest.mark.parametrize(("text", "every"), [("", 64), (" 8 ", 8), ("0", 0), ("-1", 0), ("often", 0)])
def test_how_many_steps_are_traced(text: str, every: int) -> None:
    assert ids.every({ids.EVERY_VARIABLE: text}) == every
    assert ids.are_traced(moe_config(), {ids.EVERY_VARIABLE: text}) == (every > 0)


def test_nothing_is_traced_of_other_models_and_without_a_place_for_traces() -> None:
    dense, silent = moe_config(), moe_config()
    dense.model_config.is_moe = False
    silent.observability_config.otlp_traces_endpoint = None
    assert ids.are_traced(moe_config(), {})
    assert not ids.are_traced(dense, {})
    assert not ids.are_traced(silent, {})
    assert not ids.are_traced(SimpleNamespace(), {})


# The engine core's side.


def test_forward_passes_are_counted_and_told() -> None:
    a = Request("a", num_prompt_tokens=10, num_computed_tokens=10)
    batches = joined(moe_scheduler(a=a))
    assert batch_of(scheduled(batches, {})) is None
    assert batch_of(scheduled(batches, {"a": 10})) is not None
    batches.dummy(SimpleNamespace())
    found = batch_of(scheduled(batches, {"a": 10}))
    assert found is not None
    assert (found.group, found.number, found.waiting_requests) == ("g", 3, 3)


def test_a_batch_is_described() -> None:
    long = Request("long", num_prompt_tokens=100, num_computed_tokens=60)  # its second chunk
    done = Request("done", {"traceparent": UNSAMPLED}, num_prompt_tokens=20, num_computed_tokens=25)
    plain = Request("plain", None, num_prompt_tokens=5, num_computed_tokens=9)
    batches = joined(moe_scheduler(long=long, done=done, plain=plain))
    found = batch_of(scheduled(batches, {"long": 30, "done": 1, "plain": 3}))
    assert found == Batch("g", 1, False, 1, 30, 2, 4, 94, 3, (SAMPLED,), unlinked=0, waiting_tokens=0)
    assert found.tokens == 34


def test_a_batch_with_more_requests_than_links_says_how_many_more() -> None:
    many = {f"r{n}": Request(f"r{n}", None if n % 5 == 0 else {"traceparent": SAMPLED}) for n in range(100)}
    found = batch_of(scheduled(joined(moe_scheduler(**many)), dict.fromkeys(many, 1)))
    assert found is not None
    assert (len(found.callers), found.unlinked) == (MAX_LINKS, 80 - MAX_LINKS)
    said = attributes(Record(found, 0, 0.0), None, RANK)
    assert said[names.STEP_UNLINKED_REQUESTS] == 80 - MAX_LINKS
    assert names.STEP_UNLINKED_REQUESTS not in attributes(record_of(1), None, RANK)


def test_the_prompt_tokens_in_the_queue() -> None:
    scheduler = moe_scheduler(a=Request("a"))
    queue = [Request("b", num_prompt_tokens=700), Request("c", num_prompt_tokens=50)]
    scheduler.waiting = deque(queue)
    batches = joined(scheduler)
    found = batch_of(scheduled(batches, {"a": 1}))
    assert found is not None
    assert attributes(Record(found, 0, 0.0), None, RANK)[names.STEP_WAITING_TOKENS] == 750
    scheduler.waiting = iter(queue)
    found = batch_of(scheduled(batches, {"a": 1}))
    assert found is not None
    assert found.waiting_tokens is None
    assert names.STEP_WAITING_TOKENS not in attributes(Record(found, 0, 0.0), None, RANK)


def test_what_travels_is_plain() -> None:
    """A worker without the plugin must be able to unpickle it."""
    batches = joined(moe_scheduler(a=Request("a")))
    told = getattr(scheduled(batches, {"a": 1}), ATTRIBUTE)
    assert type(told) is tuple
    assert {type(value) for value in told} <= {str, int, bool, tuple}


def test_the_prompt_tokens_of_a_long_queue_are_estimated_by_its_first_requests() -> None:
    scheduler = moe_scheduler(a=Request("a"))
    read = 0

    class Waiting(Request):
        @property
        def num_prompt_tokens(self) -> int:
            nonlocal read
            read += 1
            return 90 + 20 * (read % 2)

        @num_prompt_tokens.setter
        def num_prompt_tokens(self, tokens: int) -> None: ...

    scheduler.waiting = deque(Waiting(f"r{n}") for n in range(10_000))
    found = batch_of(scheduled(joined(scheduler), {"a": 1}))
    assert found is not None
    assert (found.waiting_tokens, read) == (10_000 * 100, MOST_COUNTED)


def test_engines_have_a_group_before_their_loops_begin_and_tell_their_workers() -> None:
    plugin = Plugin()
    store = Store()
    groups = set()
    for _ in range(2):
        each = engine(moe_scheduler(a=Request("a")), store)
        plugin._joining(each)
        batches = plugin._collector(each.scheduler).batches
        assert batches is not None
        assert heard.group == batches.group
        groups.add(batches.group)
    assert len(groups) == 1
    assert "" not in groups


def test_an_engine_alone_has_a_group_of_its_own() -> None:
    groups = set()
    for _ in range(2):
        scheduler = moe_scheduler(a=Request("a"))
        scheduler.vllm_config = moe_config(data_parallel_size=1)
        batches = Batches(scheduler, Guard(), {ids.EVERY_VARIABLE: "1"})
        found = batch_of(scheduled(batches, {"a": 1}))
        assert found is not None
        groups.add(found.group)
    assert len(groups) == 2
    assert "" not in groups


def test_without_a_name_of_the_group_nothing_is_told() -> None:
    batches = Batches(moe_scheduler(a=Request("a")), Guard(), {ids.EVERY_VARIABLE: "1"})
    assert getattr(scheduled(batches, {"a": 1}), ATTRIBUTE, None) is None


def test_one_in_n_steps_is_traced_and_the_others_have_their_number() -> None:
    batches = joined(moe_scheduler(a=Request("a")), "3")
    steps = [scheduled(batches, {"a": 1}) for _ in range(7)]
    assert [getattr(step, ATTRIBUTE)[:2] for step in steps] == [("g", number) for number in range(1, 8)]
    assert [b.number for step in steps if (b := batch_of(step))] == [3, 6]


def test_requests_know_their_steps() -> None:
    request = Request("a", num_prompt_tokens=10)
    scheduler = moe_scheduler()
    batches = joined(scheduler)
    collector = Collector(scheduler, batches)
    scheduler.add_request(request)
    collector.added(request, 0)
    request.num_computed_tokens, request.is_prefill_chunk = 6, True
    collector.scheduled(Step({"a": 6}, [SimpleNamespace(req_id="a")]), 1.0)
    request.num_computed_tokens, request.is_prefill_chunk = 10, False
    collector.scheduled(Step({"a": 4}), 2.0)
    for _ in range(MAX_STEPS + 1):
        collector.scheduled(Step({"a": 1}), 3.0)
    facts = collector._live["a"].facts
    assert (facts.step_group, facts.step_rank, facts.prefill_steps) == ("g", 2, [1, 2])
    assert facts.decode_steps == [*range(3, 3 + MAX_STEPS)]
    facts.scheduled, facts.first_token, facts.last_token, facts.output_tokens = 1.0, 2.5, 9.0, 9
    _, prefill, decode = request_phases(facts, "a")
    assert [link.trace_id for link in prefill.steps] == [ids.trace_id("g", 1), ids.trace_id("g", 2)]
    assert [link.span_id for link in prefill.steps] == [ids.span_id("g", 1, 2), ids.span_id("g", 2, 2)]
    assert len(decode.steps) == MAX_STEPS


def test_a_fault_in_steps_takes_away_no_requests_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails of what the engine core does for steps, one line says it, and the rest of the plugin goes on."""
    said: list[str] = []
    monkeypatch.setattr("llmtrace.engine.hooks.logger.error", lambda text, *values: said.append(text % values))

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    places = {
        "setting up steps": (Batches, "__init__"),
        "counting steps": (Batches, "_describe"),
        "noting the requests of a step": (Collector, "_note_step"),
        "reading what a caller wants": (Demand, "_admitted"),
        "opening a window of steps": (Demand, "_decide"),
    }
    monkeypatch.setenv(ids.EVERY_VARIABLE, "1")
    for place, (owner, name) in places.items():
        said.clear()
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, fails)
            plugin = Plugin()
            request = Request("a", {"traceparent": SAMPLED, "tracestate": "llmtrace=steps"}, num_prompt_tokens=4)
            scheduler = moe_scheduler(a=request)
            scheduler.vllm_config = moe_config(data_parallel_size=1)
            collector = plugin.guard.run("add", plugin._collector, scheduler)
            plugin.guard.run("add", plugin._added, 0, None, scheduler, request)
            for tokens in (4, 1):
                news = [SimpleNamespace(req_id="a")] if tokens == 4 else []
                plugin.guard.run("schedule", plugin._scheduled, 1.0, Step({"a": tokens}, news), scheduler)
        assert plugin.guard.on, place
        assert collector._live["a"].facts.chunk_count == 1
        (line,) = said
        assert line.startswith(f"llmtrace: fault in {place} (RuntimeError in fails, line "), line
        assert "secret" not in line
        assert "engine spans" not in line


def test_workers_are_told_nothing_more_once_steps_are_off() -> None:
    batches = joined(moe_scheduler(a=Request("a")))
    batches.guard.on = False
    step = scheduled(batches, {"a": 1})
    assert getattr(step, ATTRIBUTE, None) is None


def test_engines_of_other_models_count_nothing() -> None:
    plugin = Plugin()
    scheduler = Scheduler()
    assert plugin._collector(scheduler).batches is None
    plugin._dummy(SimpleNamespace(scheduler=scheduler))
    moe = moe_scheduler()
    plugin._dummy(SimpleNamespace(scheduler=moe))
    assert plugin._collector(moe).batches is not None
    assert plugin._collector(moe).batches.number == 1  # type: ignore[union-attr]


# The worker's side.


class World:
    """A worker of vLLM's shape with two MoE layers; the work of each phase takes what the test says."""

    def __init__(self, every: str = "1", group: str = "g", experts_every: str = "1") -> None:
        self.clock = Clock()
        self.guard = Guard()
        self.sent: list[Record] = []
        self.counts = Counts()
        self.monkey = pytest.MonkeyPatch()
        self.monkey.setenv(ids.EVERY_VARIABLE, every)
        self.monkey.setenv(ids.EXPERTS_VARIABLE, experts_every)
        sender = SimpleNamespace(send=self.sent.append)
        self.recorder = Recorder(self.clock)
        self.steps = StepWorker(self.recorder, sender, self.counts, self.guard)  # type: ignore[arg-type]
        self.monkey.undo()
        heard.group = group
        world = self

        class Model:
            def __init__(self) -> None:
                self.before: list[Any] = []
                self.after: list[Any] = []

            def register_forward_pre_hook(self, hook: Any, with_kwargs: bool) -> Any:
                assert with_kwargs
                self.before.append(hook)
                return SimpleNamespace(remove=lambda: self.before.remove(hook))

            def register_forward_hook(self, hook: Any) -> Any:
                self.after.append(hook)
                return SimpleNamespace(remove=lambda: self.after.remove(hook))

            def __call__(self, positions: Any) -> None:
                for hook in self.before:
                    hook(self, (), {"positions": positions})
                for _ in range(2):
                    world.pass_by(3.0)
                    world.layer.eplb_mapping("chosen")
                    world.layer.prepare()
                    world.layer.fused_experts()
                    world.layer.reduce_final_output()
                world.pass_by(1.0)
                for hook in self.after:
                    hook(self, (), None)

        class Layer:
            global_num_experts = 8

            def eplb_mapping(self, topk_ids: str) -> None: ...

            def prepare(self) -> None:
                world.pass_by(0.5)

            def fused_experts(self) -> None:
                world.pass_by(world.experts_ms.pop(0) if world.experts_ms else 6.0)

            def reduce_final_output(self) -> None:
                world.layer.all_reduce()

            def all_reduce(self) -> None:
                world.pass_by(0.25)

            def dp_sync(self) -> None:
                world.pass_by(0.125)

        class Worker:
            model = Model()

            def get_model(self) -> Model:
                return self.model

            def execute_model(self, scheduler_output: Any) -> str:
                return self.run(scheduler_output.total_num_scheduled_tokens + 2)

            def execute_dummy_batch(self) -> str:
                return self.run(1)

            def run(self, tokens: int) -> str:
                world.pass_by(2.0)
                world.layer.dp_sync()
                self.model(SimpleNamespace(shape=(tokens,)))
                if world.broken:
                    raise ValueError("vLLM's own")
                world.layer.prepare()  # a draft model's
                return "output"

        self.broken = False
        self.experts_ms: list[float] = []
        for name, bodies in self.steps.step_bodies().items():
            if hasattr(Worker, name):
                wrap(Worker, name, self.guard, *bodies)
        for name, bodies in self.steps.phase_bodies().items():
            if hasattr(Layer, name):
                wrap(Layer, name, self.guard, *bodies, switch=self.recorder)
        ((name, bodies),) = self.steps.expert_bodies(self.counts).items()  # type: ignore[arg-type]
        wrap(Layer, name, self.guard, *bodies, switch=self.counts)
        self.layer = Layer()
        self.worker = Worker()

    def pass_by(self, ms: float) -> None:
        self.clock.now += ms

    def step(self, number: int, traced: bool = True, tokens: int = 4) -> str:
        output = SimpleNamespace(total_num_scheduled_tokens=tokens)
        told = ("g", number, False, 1, tokens) if traced else ("g", number)
        setattr(output, ATTRIBUTE, told)
        return self.worker.execute_model(output)


class Counts:
    def __init__(self) -> None:
        self.on = True
        self.begun: list[int] = []
        self.counted: list[tuple[str, int]] = []

    def count(self, chosen: str, experts: int) -> None:
        self.counted.append((chosen, experts))

    def begin(self, tokens: int) -> None:
        self.on = True
        self.begun.append(tokens)

    def end(self) -> None:
        self.on = False

    def take(self) -> Any:
        return SimpleNamespace(tolist=lambda: [3, 5])


def test_the_phases_of_a_step() -> None:
    world = World()
    world.experts_ms = [6.0, 16.0]
    assert world.step(7) == "output"
    (record,) = world.sent
    found = phases(record, world.clock)
    assert found is not None
    assert (found.attention, found.dispatch, found.experts, found.combine, found.wait) == (7.0, 1.0, 22.0, 0.5, 0.125)
    assert (found.layer, found.layer_ms) == (1, 0.5 + 16.0 + 0.25 + 1.0)
    said = attributes(record, found, RANK)
    assert (said[names.STEP_PADDED_TOKENS], said[names.EXPERT_TOKENS]) == (2, [3, 5])
    assert world.clock.ms(record.begin, record.end) == 2.0 + 0.125 + 7.0 + 1.0 + 22.0 + 0.5 + 0.5


def test_one_in_so_many_traced_steps_tells_its_experts() -> None:
    world = World(every="2", experts_every="3")
    for number in range(2, 14, 2):
        world.step(number)
    assert [r.batch.number for r in world.sent if r.expert_tokens is not None] == [6, 12]
    assert len(world.sent) == 6


@pytest.mark.parametrize(("text", "every"), [("", 16), ("3", 6), ("0", 0), ("all", 0)])
def test_how_many_steps_tell_their_experts(text: str, every: int) -> None:
    assert ids.experts_every({ids.EVERY_VARIABLE: "2", ids.EXPERTS_VARIABLE: text}) == every


def test_a_step_that_is_not_traced_leaves_no_mark() -> None:
    world = World()
    world.step(7, traced=False)
    world.worker.execute_dummy_batch()
    world.sent.clear()
    world.step(9, traced=False)
    assert (world.sent, world.counts.begun, world.counts.counted) == ([], [], [])
    assert (world.worker.model.before, world.worker.model.after) == ([], [])


def test_experts_are_counted_in_sampled_steps_and_before_the_first_one() -> None:
    """There vLLM captures its CUDA graphs, which have to have it in them."""
    world = World()
    layers = [("chosen", 8)] * 2
    world.worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=9))  # vLLM's warm-up
    assert (world.sent, world.counts.begun, world.counts.counted) == ([], [], layers)
    world.step(1)
    world.step(2, traced=False)
    assert (world.counts.begun, world.counts.counted, world.counts.on) == ([4], 2 * layers, False)


def test_a_worker_that_is_told_no_numbers_any_more_traces_no_dummy_steps() -> None:
    """The engine core's part is switched off: the worker's own numbers are not those of the other ranks."""
    world = World()
    world.step(1)
    world.worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=0))  # no forward pass
    world.worker.execute_dummy_batch()
    world.worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=9))
    world.worker.execute_dummy_batch()
    assert [r.batch.number for r in world.sent] == [1, 2]
    world.step(8)
    world.worker.execute_dummy_batch()
    assert [r.batch.number for r in world.sent] == [1, 2, 8, 9]


def test_dummy_steps_follow_the_number_that_was_told_last() -> None:
    world = World(every="2")
    for _ in range(2):
        world.worker.execute_dummy_batch()  # 1, 2
    world.step(3, traced=False)
    world.worker.execute_dummy_batch()  # 4
    assert [(r.batch.number, r.batch.dummy) for r in world.sent] == [(2, True), (4, True)]
    assert attributes(world.sent[0], None, RANK)[names.STEP_PADDED_TOKENS] == 1


def test_a_rank_that_does_not_know_its_group_yet_says_nothing() -> None:
    world = World(group="")
    world.worker.execute_dummy_batch()
    assert world.sent == []
    world.step(2)
    world.worker.execute_dummy_batch()
    assert [r.batch.number for r in world.sent] == [2, 3]


def test_a_step_in_which_vllm_fails_is_forgotten() -> None:
    world = World()
    world.broken = True
    with pytest.raises(ValueError, match="vLLM's own"):
        world.step(1)
    world.broken = False
    world.step(2)
    assert [r.batch.number for r in world.sent] == [2]
    found = phases(world.sent[0], world.clock)
    assert found is not None
    assert found.attention == 7.0


def test_a_fault_switches_steps_off_and_vllm_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.counts.begin = None  # type: ignore[assignment]
    assert world.step(1) == "output"
    assert world.step(2) == "output"
    assert (world.sent, world.guard.on) == ([], False)


def test_a_fault_within_the_models_forward_leaves_it_alone() -> None:
    world = World()
    world.recorder.forward_begins = None  # type: ignore[method-assign,assignment]
    assert world.step(1) == "output"
    assert (world.sent, world.guard.on, world.recorder.on, world.counts.on) == ([], False, False, False)
    assert (world.worker.model.before, world.worker.model.after) == ([], [])


def test_experts_that_moved_are_told_by_the_next_traced_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM moves them when it samples the tokens of a step, which is after the worker's forward pass."""
    world = World(every="4")
    now_ns = 0
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns)

    class EplbState:
        def rearrange(self, is_profile: bool = False) -> str:
            nonlocal now_ns
            now_ns += 250_000_000
            return "moved"

    wrap(EplbState, "rearrange", world.guard, *world.steps.step_bodies()["rearrange"])
    state = EplbState()
    state.rearrange(is_profile=True)  # vLLM's warm-up
    state.rearrange(True)
    world.step(4)
    assert state.rearrange() == "moved"
    world.step(5, traced=False)
    state.rearrange()
    world.worker.execute_dummy_batch()
    world.step(8)
    world.step(12)
    assert [(r.batch.number, r.rearrangements, r.rearrangement_ms) for r in world.sent] == [
        *((4, 0, 0.0), (8, 2, 500.0), (12, 0, 0.0))
    ]
    said = [attributes(record, None, RANK) for record in world.sent]
    assert [s.get(names.REARRANGEMENTS) for s in said] == [None, 2, None]
    assert [s.get(names.REARRANGEMENT_TIME) for s in said] == [None, 500.0, None]


@pytest.mark.parametrize("replicas", [None, 6])
def test_tokens_are_counted_by_logical_experts(replicas: int | None) -> None:
    """With EPLB the router's own number is that of all replicas."""
    world = World()
    state = SimpleNamespace(logical_replica_count=None if replicas is None else SimpleNamespace(shape=(replicas,)))
    router = SimpleNamespace(global_num_experts=8, eplb_state=state)
    before, _ = world.steps.expert_bodies(world.counts)["eplb_mapping"]  # type: ignore[arg-type]
    assert before is not None
    before(router, "chosen")
    before(SimpleNamespace(global_num_experts=8), "chosen")
    assert world.counts.counted == [("chosen", replicas or 8), ("chosen", 8)]


def test_no_phases_where_the_layers_were_not_seen() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    recorder.begin(Batch("g", 1))
    record = recorder.end()
    assert record is not None
    assert phases(record, clock) is None
    assert names.STEP_ATTENTION not in attributes(record, None, RANK)


work = st.floats(0.0, 100.0)
layer = st.tuples(work, work, work, work, work)


@given(waits=st.lists(work, max_size=3), layers=st.lists(layer, min_size=1, max_size=5), tail=work)
def test_phases_add_up_to_the_forward_and_the_waiting_before(
    waits: list[float], layers: list[tuple[float, ...]], tail: float
) -> None:
    clock = Clock()
    recorder = Recorder(clock)

    def phase(name: str, took: float) -> None:
        recorder.enter()
        clock.now += took
        recorder.leave(name)

    recorder.begin(Batch("g", 1))
    for took in waits:
        phase(WAIT, took)
        clock.now += 1.0
    begin = clock.now
    recorder.forward_begins(4)
    for attention, *took in layers:
        clock.now += attention
        for name, each in zip((WAIT, DISPATCH, EXPERTS, COMBINE), took, strict=True):
            phase(name, each)
    clock.now += tail
    recorder.forward_ends()
    forward = clock.now - begin
    record = recorder.end()
    assert record is not None
    found = phases(record, clock)
    assert found is not None
    total = found.attention + found.dispatch + found.experts + found.combine + found.wait
    assert total == pytest.approx(forward + sum(waits), abs=1e-6)
    assert found.attention == pytest.approx(sum(took[0] for took in layers) + tail, abs=1e-6)
    assert found.layer is not None


# Spans.


def test_a_span_says_what_its_engine_ran() -> None:
    prompt = Request("prompt", num_prompt_tokens=100, num_computed_tokens=60)  # its second chunk
    decode = Request("decode", None, num_prompt_tokens=20, num_computed_tokens=25)
    scheduler = moe_scheduler(prompt=prompt, decode=decode)
    scheduler.counts = (2, 7)
    batch = batch_of(scheduled(joined(scheduler), {"prompt": 30, "decode": 1}))
    assert batch is not None
    said = attributes(Record(batch, 0, 0.0, computed_tokens=40), None, RANK)
    assert said[names.STEP_WAITING_REQUESTS] == 7
    assert said[names.STEP_KV_READ_TOKENS] == 60 + 25
    assert (said[names.STEP_PREFILL_REQUESTS], said[names.STEP_PREFILL_TOKENS]) == (1, 30)
    assert (said[names.STEP_DECODE_REQUESTS], said[names.STEP_DECODE_TOKENS]) == (1, 1)
    assert said[names.STEP_PADDED_TOKENS] == 40 - 31


def sender(clock: Clock, rank: Rank = RANK) -> tuple[Sender, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Sender(
        Guard(), clock, rank, SimpleSpanProcessor(exporter), Totals(rank.world, rank.ranks, rank.node)
    ), exporter


def record_of(number: int, callers: tuple[str, ...] = ()) -> Record:
    return Record(Batch("g", number, callers=callers), start_ns=1_000_000, begin=0.0, end=12.5)


def spans_of(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    until(lambda: len(exporter.get_finished_spans()) >= count, f"{count} spans", WAIT_S)
    return exporter.get_finished_spans()


def test_spans_of_all_ranks_are_roots_of_one_trace() -> None:
    found = []
    for world in range(2):
        each, exporter = sender(Clock(), Rank(world, 2, world, 0, world, "node-a", None))
        each.send(record_of(5, (SAMPLED, "nonsense")))
        found += spans_of(exporter, 1)
    assert {span.context.trace_id for span in found} == {ids.trace_id("g", 5)}
    assert [span.context.span_id for span in found] == [ids.span_id("g", 5, 0), ids.span_id("g", 5, 1)]
    assert all(span.parent is None for span in found)
    (link,) = found[0].links
    assert f"{link.context.trace_id:032x}-{link.context.span_id:016x}" == SAMPLED[3:-3]
    assert (found[0].start_time, found[0].end_time) == (1_000_000, 13_500_000)
    assert found[1].attributes is not None
    assert found[1].attributes[names.WORLD_RANK] == 1


def test_a_step_is_sent_when_the_device_has_come_to_its_end() -> None:
    clock = Clock()
    clock.device = 10.0
    each, exporter = sender(clock)
    each.send(record_of(5))
    until(lambda: clock.looks > 1, "a second look at the marks", WAIT_S)
    assert exporter.get_finished_spans() == ()
    clock.device = 12.5
    spans_of(exporter, 1)


class Told(SpanExporter):
    """Writes the spans' numbers into a file, or never comes back from it."""

    def __init__(self, path: Path, hangs: bool) -> None:
        self._path = path
        self._hangs = hangs

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        while self._hangs:
            time.sleep(1.0)
        self._path.write_text(" ".join(str((span.attributes or {})[names.STEP_NUMBER]) for span in spans))
        return SpanExportResult.SUCCESS


@pytest.mark.parametrize("hangs", [False, True])
def test_a_forked_worker_sends_its_last_steps_before_it_ends(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hangs:
        monkeypatch.setattr("llmtrace.engine.steps.sender.FLUSH_S", 0.2)
    told = tmp_path / "told"

    def work() -> None:
        minutes = BatchSpanProcessor(Told(told, hangs), schedule_delay_millis=600_000)
        each = Sender(Guard(), Clock(), RANK, minutes, Totals(RANK.world, RANK.ranks, RANK.node))
        for number in (64, 128):
            each.send(record_of(number))

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(30.0)
    assert worker.exitcode == 0
    assert (told.read_text() if told.exists() else "") == ("" if hangs else "64 128")


def test_sending_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this one would wait for a device that never comes to the end of any step."""
    monkeypatch.setattr("llmtrace.engine.steps.sender.MARKS_S", float("inf"))
    monkeypatch.setattr("llmtrace.engine.steps.sender.FLUSH_S", 0.0)
    clock = Clock()
    clock.device = 0.0
    each, _ = sender(clock)
    for number in range(1500):
        each.send(record_of(number))
    assert each.dropped >= 1500 - QUEUE_SIZE - 1


# Metrics.


def sums(reader: InMemoryMetricReader) -> dict[str, dict[Any, float]]:
    """The values of each metric by what is its own: a phase, a kind of tokens, an expert."""
    data = reader.get_metrics_data()
    found: dict[str, dict[Any, float]] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else []:
        for point in metric.data.data_points:
            own = dict(point.attributes or {})
            assert (own.pop(names.WORLD_RANK), own.pop(names.NODE), own.pop(names.STEP_GROUP)) == (1, "node-a", "g")
            ((_, key),) = own.items()
            found.setdefault(metric.name, {})[key] = point.value  # type: ignore[union-attr]
    return found


def test_steps_are_summed_up_in_metrics() -> None:
    reader = InMemoryMetricReader()
    totals = Totals(1, 2, "node-a")
    totals.publish(MeterProvider([reader]).get_meter("m"))
    assert sums(reader) == {}, "before the first step its group is not known"
    for tokens in ([5, 0, 3], [1, 1, 0]):
        batch = Batch("g", 64, prefill_tokens=6, decode_tokens=2)
        record = Record(batch, 0, 0.0, computed_tokens=10, expert_tokens=SimpleNamespace(tolist=lambda t=tokens: t))
        totals.add(record, Phases(4.0, 1.0, 2.0, 1.5, 0.5, 0, 1.0), 12.0)
    totals.add(Record(Batch("g", 65, dummy=True), 0, 0.0), None, 99.0)
    assert sums(reader) == {
        names.STEP_TIME_METRIC: pytest.approx(
            {"attention": 0.008, "dispatch": 0.002, "experts": 0.004, "combine": 0.003, "wait": 0.001, "other": 0.006}
        ),
        names.STEPS_METRIC: {False: 2, True: 1},
        names.STEP_TOKENS_METRIC: {"prefill": 12, "decode": 4, "padding": 4},
        names.EXPERT_LOAD_METRIC: {0: 6, 1: 1, 2: 3},
    }


def test_a_sender_sums_up_what_it_sends() -> None:
    reader = InMemoryMetricReader()
    totals = Totals(RANK.world, RANK.ranks, RANK.node)
    totals.publish(MeterProvider([reader]).get_meter("m"))
    exporter = InMemorySpanExporter()
    each = Sender(Guard(), Clock(), RANK, SimpleSpanProcessor(exporter), totals)
    each.send(record_of(5))
    spans_of(exporter, 1)
    each.flush()
    assert sums(reader)[names.STEPS_METRIC] == {False: 1, True: 0}


@pytest.mark.parametrize(
    ("ranks", "experts", "telling"), [(16, 256, 16), (64, 256, 64), (256, 256, 64), (320, 256, 64)]
)
def test_series_of_experts_are_bounded_by_ranks_that_tell_none(ranks: int, experts: int, telling: int) -> None:
    told = 0
    for world in range(ranks):
        reader = InMemoryMetricReader()
        totals = Totals(world, ranks, "node-a")
        totals.publish(MeterProvider([reader]).get_meter("m"))
        tokens = SimpleNamespace(tolist=lambda: [1] * experts)
        totals.add(Record(Batch("g", 64), 0, 0.0, expert_tokens=tokens), None, 1.0)
        data = reader.get_metrics_data()
        assert data is not None
        told += names.EXPERT_LOAD_METRIC in {m.name for m in data.resource_metrics[0].scope_metrics[0].metrics}
    assert told == telling
    assert told * experts <= MOST_EXPERT_SERIES


def test_ranks_are_numbered_by_engine() -> None:
    config = moe_config().parallel_config
    found = rank_of(SimpleNamespace(rank=1), config, {"LLMTRACE_NODE": "node-7"})
    assert found == Rank(world=3, ranks=4, dp=1, tp=1, ep=3, node="node-7", all2all="naive")
    config.enable_expert_parallel = False
    assert rank_of(SimpleNamespace(rank=0), config, {}).ep is None
    assert node_name({"K8S_NODE_NAME": "worker-3"}) == "worker-3"
    assert node_name({})


@pytest.mark.parametrize(
    ("tp", "parts", "found"), [(0, False, (64, 0)), (1, False, None), (0, True, (65, 0)), (1, True, (65, 1))]
)
def test_tensor_parallel_ranks_tell_what_they_route(tp: int, parts: bool, found: tuple[int, int] | None) -> None:
    config = moe_config(use_sequence_parallel_moe=parts)
    config.scheduler_config = SimpleNamespace(max_num_batched_tokens=64)
    counts = expert_tokens(None, Rank(tp, 2, 0, tp, tp, "node-a", None), config)
    assert (None if counts is None else (counts._most, counts._part)) == found


def test_what_torch_compile_takes_apart_is_left_alone() -> None:
    config = moe_config()
    assert is_wanted("all_reduce", config, on_cpu=False)
    assert not is_wanted("all_reduce", moe_config(tensor_parallel_size=1), on_cpu=False)
    config.compilation_config.mode = 3
    named = ("prepare", "all_reduce", "reduce_final_output", "execute_model", "dp_sync")
    on_gpu = {name for name in named if is_wanted(name, config, on_cpu=False)}
    assert on_gpu == {"prepare", "execute_model", "dp_sync"}
    assert not is_wanted("prepare", config, on_cpu=True)
    assert is_wanted("execute_model", config, on_cpu=True)
