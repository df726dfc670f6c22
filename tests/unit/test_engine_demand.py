"""Steps on demand: who asks, what all ranks agree on, what is traced, and what is left alone."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import SAMPLED, Output, Outputs, Request, Status, Step, Store
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_steps import (
    RANK,
    Clock,
    World,
    batch_of,
    moe_config,
    moe_scheduler,
    record_of,
    scheduled,
    sender,
    spans_of,
)

from llmtrace.engine.collector import Collector
from llmtrace.engine.facts import MAX_STEPS, asks_for_steps, from_wire, to_wire
from llmtrace.engine.hooks import Guard
from llmtrace.engine.plugin import Plugin
from llmtrace.engine.spans import phases as request_phases
from llmtrace.engine.steps import demand as module
from llmtrace.engine.steps import ids
from llmtrace.engine.steps.batch import ATTRIBUTE, Batch, Batches
from llmtrace.engine.steps.demand import (
    AHEAD_TICKS,
    BUDGET_VARIABLE,
    NONE,
    SLOW_VARIABLE,
    WINDOW,
    Agreement,
    Demand,
    Proposal,
    hear,
    heard,
)
from llmtrace.semconv import attributes as names

EVERY = 1000
"""So many that no step of a test is of the sample, unless the test says so."""


@pytest.fixture(autouse=True)
def _nothing_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heard, "group", "")
    monkeypatch.setattr(heard, "window", NONE)


class Group:
    """Engines that step together, and look into their store whenever the test says so."""

    def __init__(self, engines: int, pace: int = 5) -> None:
        self.store = Store()
        self.engines = [Agreement(self.store, engines) for _ in range(engines)]
        self.windows: list[range | None] = [None] * engines
        self.number = 0
        self.pace = pace

    def tick(self, *wanted: int, deaf: tuple[int, ...] = ()) -> None:
        """All engines do some steps, and all but the ``deaf`` look; those ``wanted`` have a slow request."""
        self.number += self.pace
        for rank, engine in enumerate(self.engines):
            if rank not in deaf:
                self.windows[rank] = engine.look(self.number, rank in wanted) or self.windows[rank]


# Agreeing.


def test_all_engines_get_the_same_window_some_time_ahead() -> None:
    group = Group(4)
    group.tick()
    assert group.windows == [None] * 4
    proposed = group.number + group.pace
    for _ in range(3):
        group.tick(2)
    start = proposed + AHEAD_TICKS * group.pace
    assert group.windows == [range(start, start + WINDOW)] * 4
    assert group.number < start


def test_nobody_proposes_without_a_slow_request() -> None:
    group = Group(3)
    for _ in range(50):
        group.tick()
    assert group.windows == [None] * 3
    assert group.store.counts == {}


def test_proposals_at_the_same_time_become_one_window() -> None:
    group = Group(3)
    for _ in range(4):
        group.tick(0, 1, 2)
    assert len({*map(str, group.windows)}) == 1
    assert None not in group.windows
    assert group.store.asked <= 3 * 4


def test_an_engine_that_does_not_hear_in_time_makes_the_window_fall_for_all() -> None:
    group = Group(3)
    group.tick(0, deaf=(2,))
    (first,) = group.store.counts
    while group.number + group.pace < Proposal.parse(first.rpartition("/")[2]).deadline:
        group.tick(deaf=(2,))
    for _ in range(AHEAD_TICKS):
        group.tick()
    assert group.windows == [None] * 3
    assert group.store.counts[first] == 2


def test_after_a_window_that_fell_the_next_one_is_agreed_on() -> None:
    group = Group(3)
    for n in range(40):
        group.tick(0, deaf=(2,) if n < 15 else ())
    assert None not in group.windows
    assert len({*map(str, group.windows)}) == 1
    assert len(group.store.counts) <= 2, "what was promised before is deleted"


def test_an_engine_that_is_never_heard_of_costs_a_few_looks_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("llmtrace.engine.hooks.logger.info", lambda text, *values: said.append(text % values))
    group = Group(2)
    for _ in range(200):
        group.tick(0, deaf=(1,))
    assert group.windows == [None, None]
    assert group.store.asked < 50
    assert said == [
        "llmtrace: steps 55 to 118 are not traced on demand: not every engine promised them in time (said once)"
    ]


def test_while_nothing_runs_nobody_looks() -> None:
    group = Group(2)
    group.tick()
    asked = group.store.asked
    for engine in group.engines:
        for _ in range(10):
            assert engine.look(group.number, True) is None
    assert group.store.asked == asked


def test_the_fastest_tick_of_late_counts() -> None:
    group = Group(2, pace=30)
    group.tick()
    group.pace = 1
    for _ in range(3):
        group.tick(1)
    window = group.windows[0]
    assert window is not None
    assert window.start == 31 + AHEAD_TICKS * 30


def test_an_engine_that_joins_late_does_not_take_an_old_window_for_a_new_one() -> None:
    group = Group(1)
    for _ in range(3):
        group.tick(0)
    window = group.windows[0]
    assert window is not None
    late = Agreement(group.store, 1)
    assert late.look(window.start, False) is None
    assert late.look(window.start + 1, False) is None


@given(proposal=st.builds(Proposal, *[st.integers(0, 1 << 60)] * 3))
def test_a_proposal_is_read_as_it_was_written(proposal: Proposal) -> None:
    assert Proposal.parse(str(proposal)) == proposal


@settings(max_examples=50, deadline=None)
@given(data=st.data(), engines=st.integers(2, 5))
def test_whatever_the_timing_no_window_is_traced_by_a_part_of_the_ranks(data: st.DataObject, engines: int) -> None:
    """Each engine looks when it likes, but for pauses that are longer than half of the way to the start."""
    pace, last = 10, 500
    store = Store()
    group = [Agreement(store, engines) for _ in range(engines)]
    known: list[set[range]] = [set() for _ in range(engines)]
    silent = [0] * engines
    until = [0] * engines
    for number in range(pace, last, pace):
        for rank in data.draw(st.permutations(range(engines))):
            if silent[rank] < 3 and data.draw(st.booleans()):
                silent[rank] += 1
                continue
            silent[rank] = 0
            at = number - data.draw(st.integers(0, 2))  # asynchronous scheduling: a step or two apart
            window = group[rank].look(at, at >= until[rank] and data.draw(st.booleans()))
            if window is not None:
                assert at < window.start
                known[rank].add(window)
                until[rank] = window.stop
    ended = last - 6 * pace
    assert len({frozenset(w for w in windows if w.start < ended) for windows in known}) == 1


# One engine's demand.


class Steps:
    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.window = NONE
        self.group = "g"


def demand_of(steps: Any, engines: int = 1, slow: str = "", budget: str = "") -> Demand:
    return Demand(steps, engines, {SLOW_VARIABLE: slow, BUDGET_VARIABLE: budget})


def test_with_one_engine_the_window_begins_at_the_next_step() -> None:
    steps = Steps(41)
    demand_of(steps).ask(Request("a"))
    assert steps.window == range(42, 42 + WINDOW)


def test_the_budget_bounds_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    steps = Steps()
    wanted = demand_of(steps, budget=str(2 * WINDOW))  # two windows a minute
    opened = []
    for second in range(120):
        now[0] = 1000.0 + second
        steps.number += 50
        before = steps.window
        wanted.ask(Request("a"))
        if steps.window is not before:
            opened.append(second)
    assert opened == [0, 30, 60, 90]


def test_with_one_engine_a_request_asks_until_the_budget_allows_it_or_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    slow, later, over = (Request(name, num_prompt_tokens=10) for name in ("slow", "later", "over"))
    batches, _ = one_engine(slow, later, over, **{BUDGET_VARIABLE: str(2 * WINDOW)})
    told = []

    def step_at(seconds: float) -> None:
        now[0] = 1000.0 + seconds
        step = scheduled(batches, {"later": 1})
        told.append(batch_of(step) is not None)

    batches.demand.ask(slow)
    for _ in range(WINDOW):
        step_at(1.0)
    batches.demand.ask(later)
    assert batches.demand.pending
    step_at(29.0)
    step_at(31.0)
    assert told == [True] * WINDOW + [False, True]
    assert (batches.window, batches.demand.pending) == (range(WINDOW + 2, 2 * WINDOW + 2), False)
    batches.demand.ask(over)
    over.status = Status.FINISHED_STOPPED
    step_at(90.0)
    assert (batches.window.start, batches.demand.pending) == (WINDOW + 2, False)


def test_windows_do_not_overlap() -> None:
    steps = Steps()
    wanted = demand_of(steps, budget=str(10**15))
    wanted.ask(Request("a"))
    first = steps.window
    steps.number = first.stop - 2
    wanted.ask(Request("b"))
    assert steps.window is first
    steps.number = first.stop - 1
    wanted.ask(Request("b"))
    assert steps.window == range(first.stop, first.stop + WINDOW)


@pytest.mark.parametrize(("slow", "budget"), [("0", ""), ("", "0"), ("soon", ""), ("", "-5")])
def test_it_can_be_switched_off(slow: str, budget: str) -> None:
    steps = Steps()
    wanted = demand_of(steps, slow=slow, budget=budget)
    wanted.ask(Request("a"))
    assert (steps.window, wanted.slow_s) == (NONE, float("inf"))
    threads = threading.active_count()
    demand_of(steps, 2, slow, budget).join(Store())
    assert threading.active_count() == threads


def test_the_usual_threshold_is_a_second() -> None:
    assert demand_of(Steps()).slow_s == 1.0
    assert demand_of(Steps(), slow="250").slow_s == 0.25


class Engines:
    """Data-parallel engines in lockstep, each with the thread that looks into their store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engines: int = 2, budget: str = "") -> None:
        monkeypatch.setattr(module, "TICK_S", 0.002)
        self.store = Store()
        self.steps = [Steps() for _ in range(engines)]
        self.demands = [demand_of(steps, engines, budget=budget) for steps in self.steps]
        self.requests: list[Request] = []

    def join(self) -> None:
        for each in self.demands:
            each.join(self.store)

    def step_until(self, true: Callable[[], bool], wait_s: float = 5.0) -> bool:
        deadline = time.monotonic() + wait_s
        while not true():
            if time.monotonic() > deadline:
                return False
            for steps in self.steps:
                steps.number += 1
            time.sleep(0.0005)
        return True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines(monkeypatch)
    yield made
    for each in made.demands:
        each._guard.on = False


def test_threads_of_two_engines_agree(engines: Engines) -> None:
    engines.join()
    engines.demands[1].ask(Request("a"))
    assert engines.step_until(lambda: all(steps.window for steps in engines.steps))
    one, two = (steps.window for steps in engines.steps)
    assert one == two
    assert engines.demands[1]._asking is None


def test_a_request_that_is_over_asks_for_nothing(engines: Engines) -> None:
    request = Request("a", status=Status.FINISHED_STOPPED)
    engines.demands[0].ask(request)
    engines.join()
    assert engines.step_until(lambda: engines.demands[0]._asking is None)
    assert not engines.step_until(lambda: any(steps.window for steps in engines.steps), 0.1)


def test_after_a_fault_nothing_is_asked_for(engines: Engines) -> None:
    engines.store.broken = True
    engines.join()
    for each in engines.demands:
        each.ask(Request("a"))
    assert engines.step_until(lambda: not any(each._guard.on for each in engines.demands))
    assert all(each._asking is None for each in engines.demands)
    engines.demands[0].ask(Request("b"))
    assert engines.demands[0]._asking is None


def test_a_fault_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("llmtrace.engine.hooks.logger.error", lambda text, *values: said.append(text % values))
    wanted = demand_of(Steps(1), 2)
    wanted._store = SimpleNamespace(clone=None)
    assert wanted.look() is False
    assert wanted.look() is False
    (line,) = said
    assert line.startswith("llmtrace: fault in agreeing on steps (TypeError in ")
    assert line.endswith("no more steps on demand from this process")


def test_ranks_that_learn_too_late_leave_the_window_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("llmtrace.engine.hooks.logger.warning", lambda text, *values: said.append(text % values))
    steps = Steps(100)
    wanted = demand_of(steps, 2)
    wanted._agreement = SimpleNamespace(look=lambda *_: range(90, 90 + WINDOW))  # type: ignore[assignment]
    assert wanted.look()
    assert steps.window == NONE
    assert said == ["llmtrace: steps 90 to 153 lack ranks of this engine, which learnt too late"]


def test_the_thread_keeps_no_engine_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.002)
    steps = Steps()
    wanted = demand_of(steps, 2)
    wanted.join(Store())
    gone = weakref.ref(wanted)
    del wanted
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    assert gone() is None
    while any(t.name == "llmtrace-steps-on-demand" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread goes with its engine"
        time.sleep(0.005)


# The engine core's side.


def one_engine(*requests: Request, every: int = EVERY, **more: str) -> tuple[Batches, Collector]:
    scheduler = moe_scheduler(**{request.request_id: request for request in requests})
    scheduler.vllm_config = moe_config(data_parallel_size=1, data_parallel_rank=0)
    batches = Batches(scheduler, Guard(), {ids.EVERY_VARIABLE: str(every), **more})
    collector = Collector(scheduler, batches)
    for request in requests:
        collector.added(request, 0)
    return batches, collector


def decoding(collector: Collector, *requests: Request) -> None:
    """The first tokens are there."""
    news = [SimpleNamespace(req_id=request.request_id) for request in requests]
    for request in requests:
        request.num_computed_tokens = request.num_prompt_tokens
    collector.scheduled(Step({r.request_id: r.num_prompt_tokens for r in requests}, news), 10.0)
    token(collector, 10.0, *requests)


def token(collector: Collector, at: float, *requests: Request) -> None:
    collector.updated({0: Outputs([Output(r.request_id, [1]) for r in requests], at)})


def test_a_late_token_opens_a_window_of_which_every_step_is_told() -> None:
    slow, other = Request("slow", num_prompt_tokens=10), Request("other", num_prompt_tokens=10)
    batches, collector = one_engine(slow, other)
    decoding(collector, slow, other)
    token(collector, 10.9, slow, other)
    assert batches.window == NONE, "a second is not over"
    token(collector, 12.0, slow)
    assert batches.window == range(2, 2 + WINDOW)
    told = []
    for _ in range(WINDOW + 3):
        step = Step({"slow": 1, "other": 1})
        slow.num_computed_tokens += 1
        other.num_computed_tokens += 1
        collector.scheduled(step, 13.0)
        told.append(batch_of(step))
    assert [b.number for b in told if b] == [*range(2, 2 + WINDOW)]
    assert all(b.on_demand and b.decode_requests == 2 for b in told if b)
    for request_id in ("slow", "other"):
        facts = collector._live[request_id].facts
        assert (facts.decode_steps, facts.decode_on_demand) == ([], [*range(2, 2 + WINDOW)])


def test_a_prompt_that_takes_long_opens_one() -> None:
    slow = Request("slow", num_prompt_tokens=90, is_prefill_chunk=True)
    batches, collector = one_engine(slow)
    collector.scheduled(Step({"slow": 10}, [SimpleNamespace(req_id="slow")]), 1.0)
    collector.scheduled(Step({"slow": 10}), 1.9)
    assert batches.window == NONE
    collector.scheduled(Step({"slow": 10}), 2.1)
    assert batches.window == range(4, 4 + WINDOW)
    collector.scheduled(Step({"slow": 10}), 2.2)
    assert collector._live["slow"].facts.prefill_on_demand == [4]


def test_a_request_can_ask_for_it() -> None:
    asks = Request("asks", {"traceparent": SAMPLED, "tracestate": "vendor=1, llmtrace=steps"})
    batches, collector = one_engine(asks)
    assert batches.window == NONE, "it is still queued"
    collector.scheduled(Step({"asks": 300}, [SimpleNamespace(req_id="asks")]), 1.0)
    assert batches.window == range(2, 2 + WINDOW)


@pytest.mark.parametrize(
    ("tracestate", "asks"),
    [
        ("llmtrace=steps", True),
        ("a=b,llmtrace=steps ", True),
        ("", False),
        ("llmtrace=step", False),
        ("x=llmtrace=steps", False),
    ],
)
def test_how_it_is_asked_for(tracestate: str, asks: bool) -> None:
    assert asks_for_steps({"tracestate": tracestate}) is asks
    assert not asks_for_steps({"traceparent": SAMPLED})


def test_requests_that_are_not_sampled_open_nothing() -> None:
    plain = Request("plain", {"traceparent": SAMPLED[:-1] + "0", "tracestate": "llmtrace=steps"})
    scheduler = moe_scheduler(plain=plain)
    scheduler.vllm_config = moe_config(data_parallel_size=1)
    batches = Batches(scheduler, Guard(), {ids.EVERY_VARIABLE: str(EVERY)})
    collector = Collector(scheduler, batches)
    collector.added(plain, collector.waiting_count(plain))
    collector.scheduled(Step({"plain": 300}, [SimpleNamespace(req_id="plain")]), 1.0)
    token(collector, 2.0, plain)
    token(collector, 9.0, plain)
    assert batches.window == NONE


def test_a_request_has_one_windows_links_beside_those_of_the_sample() -> None:
    slow = Request("slow", num_prompt_tokens=10)
    batches, collector = one_engine(slow, every=2, **{BUDGET_VARIABLE: str(10**9)})
    decoding(collector, slow)
    gap = 1.0
    at = 10.0
    for _ in range(6 * WINDOW):
        gap += 0.1
        at += gap
        token(collector, at, slow)
        collector.scheduled(Step({"slow": 1}), at)
    facts = collector._live["slow"].facts
    assert len(facts.decode_steps) == len(facts.decode_on_demand) == MAX_STEPS
    assert all(number % 2 == 0 for number in facts.decode_steps)
    assert all(number % 2 == 1 for number in facts.decode_on_demand)
    facts.scheduled, facts.first_token = 1.0, 2.5
    decode = request_phases(facts, "slow")[-1]
    assert len(decode.steps) == 2 * MAX_STEPS == 128, "as many links as OpenTelemetry keeps"
    numbers = sorted([*facts.decode_steps, *facts.decode_on_demand])
    assert [link.trace_id for link in decode.steps] == [ids.trace_id(batches.group, n) for n in numbers]


def test_the_steps_on_demand_travel_with_the_facts() -> None:
    slow = Request("slow")
    _, collector = one_engine(slow)
    facts = collector._live["slow"].facts
    facts.prefill_on_demand, facts.decode_on_demand = [4], [5, 6]
    assert from_wire(to_wire(facts)) == facts


def test_a_step_of_the_sample_is_one_in_a_window_too() -> None:
    slow = Request("slow", num_prompt_tokens=10)
    batches, collector = one_engine(slow, every=4)
    decoding(collector, slow)
    token(collector, 20.0, slow)
    told = [batch_of(scheduled(batches, {"slow": 1})) for _ in range(7)]
    assert [(b.number, b.on_demand) for b in told if b] == [
        *((2, True), (3, True), (4, False), (5, True), (6, True), (7, True), (8, False)),
    ]


def test_workers_are_told_of_the_window_before_a_pass_without_requests_and_once() -> None:
    scheduler = moe_scheduler()
    batches = Batches(scheduler, Guard(), {ids.EVERY_VARIABLE: str(EVERY)})
    calls: list[tuple[Any, ...]] = []

    def collective_rpc(method: Any, args: tuple[Any, ...]) -> None:
        calls.append((batches.number, *args))
        method(SimpleNamespace(), *args)

    engine = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=collective_rpc))
    batches.group = "g"
    batches.window = range(3, 6)
    for _ in range(7):
        batches.dummy(engine)
    assert calls == [(3, "g", 3, 6)]
    assert (heard.group, heard.window) == ("g", range(3, 6))


def test_workers_that_cannot_be_told_are_a_fault_of_this_part_only() -> None:
    plugin = Plugin()
    scheduler = moe_scheduler()
    engine = SimpleNamespace(scheduler=scheduler, model_executor=None)
    plugin._dummy(engine)
    batches = plugin._collector(scheduler).batches
    assert batches is not None
    batches.window = range(2, 60)
    plugin._dummy(engine)
    assert (batches.number, batches.window, plugin.guard.on) == (2, NONE, True)


# The worker's side.


def test_a_worker_traces_the_windows_passes_without_requests() -> None:
    world = World(every="4")
    hear(world.worker, "g", 6, 10)
    for _ in range(11):
        world.worker.execute_dummy_batch()
    assert [(r.batch.number, r.batch.on_demand) for r in world.sent] == [
        *((4, False), (6, True), (7, True), (8, False), (9, True)),
    ]


def test_a_worker_in_a_process_of_its_own_hears_the_groups_name_too() -> None:
    world = World(every="4", group="")
    hear(world.worker, "told", 1, 3)
    world.worker.execute_dummy_batch()
    assert [(r.batch.group, r.batch.number) for r in world.sent] == [("told", 1)]


def test_a_step_on_demand_tells_no_experts_and_says_why_it_is_there() -> None:
    world = World(every="4")
    output = SimpleNamespace(total_num_scheduled_tokens=4)
    batch = Batch("g", 5, on_demand=True)
    setattr(output, ATTRIBUTE, ("g", 5, False, 0, 0, 0, 0, 0, None, (), 0, None, True))
    world.worker.execute_model(output)
    (record,) = world.sent
    assert (record.batch, record.expert_tokens, world.counts.begun) == (batch, None, [])


@pytest.mark.parametrize(("on_demand", "reason", "counted"), [(False, "sampled", 1), (True, "on_demand", 0)])
def test_the_sums_are_of_the_sample(on_demand: bool, reason: str, counted: int) -> None:
    each, exporter = sender(Clock(), RANK)
    record = record_of(5)
    record.batch = Batch("g", 5, on_demand=on_demand)
    each.send(record)
    (span,) = spans_of(exporter, 1)
    each.flush()
    assert span.attributes is not None
    assert span.attributes[names.STEP_REASON] == reason
    assert sum(each._totals._steps.values()) == counted
