"""Loads of remote KV, on a scheduler that behaves as vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import Request, Scheduler, Status, Step

from llmtrace.engine import collector as collector_module
from llmtrace.engine import loads as loads_module
from llmtrace.engine.collector import Collector
from llmtrace.engine.facts import Facts, Load

LAYER = 4096
"""Bytes of a block in one layer of one worker."""


class Engine:
    """A collector beside a scheduler with a connector; one step of the loop takes a tenth of a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *layers: int, workers: int = 1) -> None:
        self.now = 10.0
        for module in (collector_module, loads_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.scheduler: Any = Scheduler()
        self.scheduler.connector = object()
        parallel = self.scheduler.vllm_config.parallel_config
        parallel.tensor_parallel_size, parallel.pipeline_parallel_size = workers, 1
        groups = [
            SimpleNamespace(layer_names=["layer"] * count, kv_cache_spec=SimpleNamespace(page_size_bytes=LAYER))
            for count in layers
        ]
        self.scheduler.kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
        self.to_fill: list[list[int]] = [[1, 2, 3] for _ in layers]
        blocks = SimpleNamespace(get_unhashed_block_ids_all_groups=lambda: self.to_fill)
        self.scheduler.kv_cache_manager = SimpleNamespace(get_blocks=lambda _: blocks)
        self.collector = Collector(self.scheduler)

    def waiting(self, name: str = "r", local: int = 0, external: int = 300) -> tuple[Request, Facts]:
        """A request whose KV is being loaded from the next step on."""
        request = Request(name, status=Status.WAITING_FOR_REMOTE_KVS)
        request.prefill_stats.num_local_cached_tokens = local
        request.prefill_stats.num_external_cached_tokens = external
        request.prefill_stats.num_computed_tokens = 300 - local - external
        self.collector.added(request, 0)
        return request, self.collector._live[name].facts

    def step(self, *new: Request, tokens: int = 300, after: Any = None, **connector: Any) -> None:
        """Schedule ``new``, run the model, and take in what the connector says."""
        step = Step(
            {request.request_id: tokens for request in new}, [SimpleNamespace(req_id=r.request_id) for r in new]
        )
        self.collector.scheduled(step, self.now)
        self.now += 0.1
        output = SimpleNamespace(**connector) if connector else None
        self.collector.stepped(step, SimpleNamespace(kv_connector_output=output))
        if after is not None:
            after()
        self.collector.updated({})


def nixl(*transfers: tuple[float, int]) -> SimpleNamespace:
    """NixlKVConnectorStats of a step: seconds and bytes of each transfer."""
    return SimpleNamespace(
        data={
            "transfer_duration": [time for time, _ in transfers],
            "bytes_transferred": [size for _, size in transfers],
        }
    )


def test_blocks_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each KV cache group by its layers, over all workers."""
    engine = Engine(monkeypatch, 10, 20, workers=4)
    engine.to_fill = [[4, 5, 6], [9]]
    _, facts = engine.waiting()
    engine.step()
    assert facts.loads == [Load(10.0, None, 300, blocks=4, size=(3 * 10 + 20) * LAYER * 4)]


def test_it_ends_with_the_step_in_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    _, facts = engine.waiting()
    engine.step(finished_recving={"r"}, kv_connector_stats=nixl((0.02, 3 * LAYER)))
    assert facts.loads == [Load(10.0, pytest.approx(10.1), 300, blocks=3, size=3 * LAYER, transfer=0.02)]
    engine.scheduler.finished_recving_kv_req_ids = {"r"}
    engine.step()
    assert len(facts.loads) == 1, "the scheduler has not looked yet"


@pytest.mark.parametrize(
    ("stats", "transfer"),
    [
        (None, None),
        (SimpleNamespace(data={}), None),
        (SimpleNamespace(data={"nixl-0": nixl((0.02, 3 * LAYER))}), None),
        (nixl((0.02, LAYER), (0.03, 2 * LAYER)), 0.03),
        (nixl((0.02, 3 * LAYER), (0.03, 3 * LAYER)), None),
        (nixl((0.02, LAYER)), None),
    ],
)
def test_time_of_the_transfer(monkeypatch: pytest.MonkeyPatch, stats: Any, transfer: float | None) -> None:
    """Only if all that was transferred in the step is what this load asked for."""
    engine = Engine(monkeypatch, 1)
    _, facts = engine.waiting()
    engine.step(finished_recving={"r"}, kv_connector_stats=stats)
    assert facts.loads[0].end is not None
    assert facts.loads[0].transfer == transfer


def test_time_of_the_transfer_is_left_out_where_two_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is not sampled, or is a turn of a request that was preempted: it is not known here."""
    engine = Engine(monkeypatch, 1)
    _, facts = engine.waiting()
    engine.step(finished_recving={"r", "other"}, kv_connector_stats=nixl((0.02, 3 * LAYER)))
    assert facts.loads[0].end is not None
    assert facts.loads[0].transfer is None


def test_without_vllms_internals_times_and_tokens_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    del engine.scheduler.kv_cache_manager, engine.scheduler.kv_cache_config, engine.scheduler.failed_recving_kv_req_ids
    engine.collector = Collector(engine.scheduler)
    _, facts = engine.waiting()
    engine.step()
    engine.step(finished_recving={"r"}, kv_connector_stats=nixl((0.02, 3 * LAYER)))
    assert facts.loads == [Load(10.0, pytest.approx(10.2), 300)]


@pytest.mark.parametrize(("local", "good"), [(0, 0), (128, 128), (128, 192)])
def test_failed_load_that_is_computed_instead(monkeypatch: pytest.MonkeyPatch, local: int, good: int) -> None:
    """VLLM leaves its hopeful numbers as they were where the request has blocks of its own."""
    engine = Engine(monkeypatch, 1)
    request, facts = engine.waiting(local=local, external=300 - local)
    engine.step()
    engine.step(finished_recving={"r"}, after=lambda: engine.scheduler.failed_recving_kv_req_ids.add("r"))
    assert facts.loads[0].failed
    request.status = Status.RUNNING
    request.num_computed_tokens = 300  # as after the step was scheduled
    engine.scheduler.failed_recving_kv_req_ids.clear()
    engine.step(request, tokens=300 - good)
    assert (facts.local_cached_tokens, facts.external_cached_tokens) == (local, good - local)
    assert facts.computed_tokens == 300 - good


def test_good_load_keeps_vllms_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    request, facts = engine.waiting(local=128, external=172)
    engine.step(finished_recving={"r"})
    request.status = Status.RUNNING
    request.num_computed_tokens = 300  # its last token is computed again
    engine.step(request, tokens=1)
    assert not facts.loads[0].failed
    assert (facts.local_cached_tokens, facts.external_cached_tokens, facts.computed_tokens) == (128, 172, 0)


def test_failed_load_that_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    request, facts = engine.waiting()
    engine.step()

    def fail() -> None:
        engine.now += 0.1
        request.status = Status.FINISHED_ERROR
        engine.collector.ended({"r"})

    monkeypatch.setattr(engine.collector, "_send_departed", lambda _: None)
    engine.step(finished_recving={"r"}, after=fail)
    assert facts.loads == [Load(10.0, facts.finished, 300, True, 3, 3 * LAYER)]
    assert facts.finish_reason == "error"


def test_aborted_during_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    request, facts = engine.waiting()
    engine.step()
    request.status = Status.FINISHED_ABORTED
    engine.collector.ended("r")
    assert [(load.end, load.failed) for load in facts.loads] == [(None, False)]


def test_loads_of_several_requests_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    found = [engine.waiting(name)[1] for name in ("a", "b")]
    engine.step()
    engine.step(finished_recving={"b"}, kv_connector_stats=nixl((0.05, 3 * LAYER)))
    engine.step(finished_recving={"a"}, kv_connector_stats=nixl((0.15, 3 * LAYER)))
    assert [(facts.loads[0].end, facts.loads[0].transfer) for facts in found] == [
        (pytest.approx(10.3), 0.15),
        (pytest.approx(10.2), 0.05),
    ]


def test_nothing_is_kept_when_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, 1)
    engine.waiting()
    engine.collector.scheduled(Step({}), engine.now)
    engine.collector.stepped(Step({}), SimpleNamespace(kv_connector_output=SimpleNamespace(finished_recving={"r"})))
    engine.collector.clear()
    assert not engine.collector._loads._arrived
