"""The local scaler: what it starts and stops, what it survives, and what its traces say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from scaling import FAST, Stand, until

from llmtrace.autoscale.record import State
from llmtrace.autoscale.scaler import Scaler
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.semconv.conformance import check
from llmtrace.traces.model import Span, Trace


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with Stand(tmp_path).serving() as made:
        made.replicas["vllm-0"].running = True
        made.replicas["vllm-0"].tokens = 5
        yield made


async def settled(scaler: Scaler) -> None:
    """Wait until nothing is being started or stopped any more, and send the traces."""
    await until(lambda: not any(d.open for d in scaler.state.decisions), "the decisions' effects")
    await scaler.send()


def decisions(stand: Stand) -> list[tuple[str, int, int]]:
    roots = [trace.roots[0].attributes for trace in stand.traces()]
    return [(str(r[a.SCALE_DIRECTION]), r[a.REPLICAS_CURRENT], r[a.REPLICAS_DESIRED]) for r in roots]  # type: ignore[misc]


def children(trace: Trace, span: Span) -> list[str]:
    return [child.name for child in trace.children(span)]


async def test_a_burst_starts_replicas_and_calm_stops_them(stand: Stand) -> None:
    scaler = stand.scaler()
    await scaler.begin()
    await scaler.tick()
    assert stand.listed() == ["vllm-0"]

    stand.load.queue = 7
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0", "vllm-1", "vllm-2"], "all replicas in the picker's file")
    stand.replicas["vllm-1"].tokens = 1
    await settled(scaler)

    stand.load.queue = 0
    stand.replicas["vllm-2"].requests = 3
    await asyncio.sleep(1.1)  # the scale-up policy's period
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0"], "the picker's file without them")
    await until(lambda: "stop vllm-2" in stand.processes.told, "the end of the drain")
    await settled(scaler)
    await scaler.close()

    assert stand.processes.told[:2] == ["start vllm-1", "start vllm-2"]
    assert set(stand.processes.told[2:]) == {"stop vllm-2", "stop vllm-1"}
    assert decisions(stand) == [("up", 1, 3), ("down", 3, 1)]
    up, down = stand.traces()
    root = up.roots[0]
    assert {k: root.attributes[k] for k in (a.SCALE_METRIC, a.SCALE_VALUE, a.SCALE_TARGET, a.SCALE_REASON)} == {
        a.SCALE_METRIC: "queue",
        a.SCALE_VALUE: 7.0,
        a.SCALE_TARGET: 1.0,
        a.SCALE_REASON: "queue above target",
    }
    assert (root.attributes[a.SCALE_LIMIT], root.attributes[a.REPLICAS_RECOMMENDED]) == (a.LIMITED_MAX, 7)
    (apply,) = up.children(root)
    first, second = sorted(up.children(apply), key=lambda s: str(s.attributes[a.REPLICA]))
    assert children(up, first) == ["container.start", "model.load", "ready", "first_request"]
    assert children(up, second) == ["container.start", "model.load", "ready"]
    assert (first.attributes[a.OUTCOME], second.attributes[a.OUTCOME]) == (a.OUTCOME_SERVED, a.OUTCOME_UNUSED)
    phases = up.children(first)
    assert [p.start_ns for p in phases[1:]] == [p.end_ns for p in phases[:-1]]
    assert [p.attributes[a.PHASE_SOURCE] for p in phases] == ["log", "log", "probe", "probe"]
    stopped = {s.attributes[a.REPLICA]: s for s in down.named(a.REPLICA_SPAN)}
    assert stopped["vllm-1"].attributes[a.OUTCOME] == a.OUTCOME_DRAINED
    assert stopped["vllm-2"].attributes[a.OUTCOME] == a.OUTCOME_CUT
    (drain,) = down.children(stopped["vllm-2"])
    assert drain.attributes[a.PHASE_SOURCE] == a.SOURCE_PROBE
    assert (drain.attributes[a.DRAIN_RUNNING], drain.attributes[a.DRAIN_CUT]) == (3, 3)
    assert check(stand.traces()).findings == []


async def test_held_at_the_maximum_is_one_decision(stand: Stand) -> None:
    scaler = stand.scaler(maxReplicaCount=1)
    await scaler.begin()
    stand.load.queue = 9
    for _ in range(4):
        await scaler.tick()
    stand.load.queue = 1
    await scaler.tick()
    await settled(scaler)
    await scaler.close()
    assert decisions(stand) == [("hold", 1, 1), ("hold", 1, 1)]
    limits = [t.roots[0].attributes[a.SCALE_LIMIT] for t in stand.traces()]
    assert limits == [a.LIMITED_MAX, a.NOT_LIMITED]
    assert stand.processes.told == []


async def test_load_that_comes_and_goes_at_the_minimum_is_no_decision(stand: Stand) -> None:
    down = {"stabilizationWindowSeconds": 300}
    advanced = {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": down}}}
    scaler = stand.scaler(advanced=advanced)
    await scaler.begin()
    for queue in (0, 1, 0, 1, 0):
        stand.load.queue = queue
        await scaler.tick()
    assert scaler.state.decisions == []
    stand.load.queue = 2
    await scaler.tick()
    stand.load.queue = 0
    for _ in range(3):
        await scaler.tick()
    assert [(d.direction, d.stabilization) for d in scaler.state.decisions] == [
        (a.SCALE_UP, a.NOT_STABILIZED),
        (a.SCALE_HOLD, a.DOWN_STABILIZED),
    ]
    await scaler.close()


async def test_a_replica_that_never_becomes_ready_says_why(stand: Stand) -> None:
    stand.options["patience"] = FAST.__class__(ready_s=0.3, retry_s=60, look_s=0.01)
    stand.replicas["vllm-1"].healthy = False
    stand.processes.log = "INFO Initializing a V1 LLM engine\nERROR 11-25 [core.py:1] no memory left\n"
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await settled(scaler)
    await scaler.close()
    (trace,) = stand.traces()
    (replica,) = trace.named(a.REPLICA_SPAN)
    assert replica.attributes[a.OUTCOME] == a.OUTCOME_FAILED
    failure = replica.attributes[a.SCALE_FAILURE]
    assert failure == "not ready within 0.3 s; its log says: ERROR 11-25 [core.py:1] no memory left"
    assert replica.status == "ERROR"
    assert children(trace, replica) == ["container.start"]
    assert stand.listed() == ["vllm-0"]
    assert stand.processes.told == ["start vllm-1", "stop vllm-1"]
    assert check(stand.traces()).findings == []


async def test_a_process_that_ends_is_given_up_and_tried_again_later(stand: Stand) -> None:
    stand.processes.fatal.add("vllm-1")
    scaler = stand.scaler()
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await settled(scaler)
    stand.processes.fatal.clear()
    await asyncio.sleep(0.25)
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0", "vllm-1", "vllm-2"], "the second attempt")
    await settled(scaler)
    await scaler.close()
    failed, repaired = stand.traces()
    failures = [s.attributes.get(a.SCALE_FAILURE) for s in failed.named(a.REPLICA_SPAN)]
    assert sorted(failures, key=str) == [None, "the process ended: FATAL"]
    assert repaired.roots[0].attributes[a.SCALE_DIRECTION] == a.SCALE_HOLD
    assert repaired.roots[0].attributes[a.SCALE_REASON] == "2 of 3 replicas run or are being started"
    assert stand.processes.told.count("start vllm-1") == 2
    assert check(stand.traces()).findings == []


async def test_another_replica_takes_the_place_of_one_that_failed(stand: Stand) -> None:
    stand.options["patience"] = FAST.__class__(ready_s=5, first_request_s=0.1, retry_s=60, look_s=0.01)
    stand.processes.fatal.add("vllm-1")
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await until(lambda: not any(d.open for d in scaler.state.decisions), "the failure")
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0", "vllm-2"], "the other replica")
    await scaler.tick()
    await settled(scaler)
    await scaler.close()
    assert stand.processes.told == ["start vllm-1", "start vllm-2"]


async def test_less_load_withdraws_a_replica_that_is_not_ready(stand: Stand) -> None:
    stand.replicas["vllm-1"].healthy = False
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await until(lambda: "start vllm-1" in stand.processes.told, "the start")
    stand.load.queue = 0
    await asyncio.sleep(1.1)
    await scaler.tick()
    await settled(scaler)
    await scaler.close()
    up, down = stand.traces()
    assert up.named(a.REPLICA_SPAN)[0].attributes[a.OUTCOME] == a.OUTCOME_WITHDRAWN
    assert down.named(a.REPLICA_SPAN)[0].attributes[a.OUTCOME] == a.OUTCOME_DRAINED
    assert stand.processes.told == ["start vllm-1", "stop vllm-1"]
    assert check(stand.traces()).findings == []


@pytest.mark.parametrize("outage", [{"status": 503}, {"queue": None, "running": None}])
async def test_without_prometheus_nothing_changes_and_one_trace_says_so(stand: Stand, outage: dict[str, Any]) -> None:
    scaler = stand.scaler()
    await scaler.begin()
    await scaler.tick()
    for key, value in outage.items():
        setattr(stand.load, key, value)
    for _ in range(3):
        await scaler.tick()
    stand.load.status, stand.load.queue, stand.load.running = 200, 0.0, 0.0
    await scaler.tick()
    await settled(scaler)
    await scaler.close()
    assert decisions(stand) == [("hold", 1, 1), ("hold", 1, 1)]
    during, after = (t.roots[0].attributes for t in stand.traces())
    assert during[a.SCALE_MISSING] == ("queue", "running") or during[a.SCALE_MISSING] == ["queue", "running"]
    assert during[a.SCALE_FAILURE]
    assert a.SCALE_MISSING not in after
    assert stand.processes.told == []
    assert scaler.registry.get_sample_value("llmtrace_autoscale_failures_total", {"part": "prometheus"}) == 6.0
    assert check(stand.traces()).findings == []


async def test_a_supervisord_that_is_away_for_a_while(stand: Stand) -> None:
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    stand.processes.gone = True
    stand.load.queue = 9
    await scaler.tick()
    await asyncio.sleep(0.1)
    assert stand.processes.told == []
    stand.processes.gone = False
    await until(lambda: stand.listed() == ["vllm-0", "vllm-1"], "the start")
    await settled(scaler)
    await scaler.close()
    assert decisions(stand) == [("up", 1, 2)]


async def test_the_first_replicas_are_no_decision(stand: Stand) -> None:
    """Those that the stack starts beside the scaler, and those that it does not."""
    for name in ("vllm-0", "vllm-1"):
        stand.replicas[name].healthy = False
    scaler = stand.scaler(minReplicaCount=2)
    await scaler.begin()
    await scaler.tick()
    assert stand.listed() == []
    for name in ("vllm-0", "vllm-1"):
        stand.replicas[name].healthy = True
    await until(lambda: scaler.fleet.serving == {"vllm-0", "vllm-1"}, "both replicas")
    await scaler.tick()
    assert stand.listed() == ["vllm-0", "vllm-1"]
    assert (stand.processes.told, scaler.state.decisions) == (["start vllm-1"], [])
    await scaler.close()


async def test_a_restart_goes_on_where_the_old_scaler_was(stand: Stand) -> None:
    """Neither lost nor done twice: the decision, the start of its replica, its trace."""
    stand.replicas["vllm-1"].healthy = False
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await until(lambda: "start vllm-1" in stand.processes.told, "the start")
    await scaler.close()
    assert stand.traces() == []

    stand.replicas["vllm-1"].healthy = True
    scaler = stand.scaler(maxReplicaCount=2)
    await scaler.begin()
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0", "vllm-1"], "the replica")
    stand.replicas["vllm-1"].tokens = 3
    await settled(scaler)
    await scaler.close()
    assert stand.processes.told == ["start vllm-1"]
    assert decisions(stand) == [("up", 1, 2)]
    (trace,) = stand.traces()
    assert trace.named(a.REPLICA_SPAN)[0].attributes[a.OUTCOME] == a.OUTCOME_SERVED
    assert State.load(stand.folder / "state.json").decisions == []


async def test_a_restart_in_the_middle_of_a_drain(stand: Stand) -> None:
    stand.options["patience"] = FAST.__class__(drain_s=30, notice_s=0.01, look_s=0.01, first_request_s=0.1)
    for name in ("vllm-0", "vllm-1"):
        stand.replicas[name].running = True
    stand.replicas["vllm-1"].requests = 2
    scaler = stand.scaler()
    await scaler.begin()
    assert scaler.state.desired == 2
    await scaler.tick()  # the first recommendation is the current number
    await asyncio.sleep(0.01)
    await scaler.tick()
    await until(lambda: stand.listed() == ["vllm-0"], "the drain")
    await scaler.close()
    scaler = stand.scaler()
    await scaler.begin()
    assert stand.listed() == ["vllm-0"]
    await scaler.tick()
    stand.replicas["vllm-1"].requests = 0
    await settled(scaler)
    await scaler.close()
    assert stand.processes.told == ["stop vllm-1"]
    assert decisions(stand) == [("down", 2, 1)]


async def test_a_trace_that_is_sent_twice_has_the_same_ids(stand: Stand) -> None:
    scaler = stand.scaler(maxReplicaCount=1)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    (decision,) = scaler.state.decisions
    assert scaler._traces.send(decision)
    assert scaler._traces.send(decision)
    await scaler.close()
    (trace,) = stand.traces()
    assert trace.duplicates == [trace.spans[0].span_id]


async def test_a_trace_that_the_collector_did_not_take_is_sent_again(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = stand.scaler(maxReplicaCount=1)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    with monkeypatch.context() as refusing:
        refusing.setattr(stand.exporter, "export", lambda _: SpanExportResult.FAILURE)
        await scaler.send()
    assert (len(scaler.state.decisions), stand.traces()) == (1, [])
    await scaler.send()
    assert (len(scaler.state.decisions), len(stand.traces())) == (0, 1)
    await scaler.close()


async def test_only_one_scaler_has_the_state(stand: Stand) -> None:
    scaler = stand.scaler()
    with pytest.raises(UserError, match="another scaler works with"):
        stand.scaler()
    await scaler.close()


def test_more_replicas_than_there_are(stand: Stand) -> None:
    with pytest.raises(UserError, match="maxReplicaCount is 4, and there are 3 replicas"):
        stand.scaler(maxReplicaCount=4)


def test_a_state_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="move it away to begin anew"):
        State.load(tmp_path / "state.json")


async def test_a_store_that_does_not_answer_costs_the_links_only(stand: Stand) -> None:
    stand.options["store"] = "http://127.0.0.1:9"
    scaler = stand.scaler(maxReplicaCount=1)
    await scaler.begin()
    stand.load.queue = 9
    await scaler.tick()
    await scaler.send()
    await scaler.close()
    (trace,) = stand.traces()
    assert a.DRIVERS_FOUND not in trace.roots[0].attributes
    assert scaler.registry.get_sample_value("llmtrace_autoscale_failures_total", {"part": "store"}) == 1.0


async def test_run_serves_until_it_is_told_to_stop(stand: Stand) -> None:
    scaler = stand.scaler()
    stop = asyncio.Event()
    task = asyncio.create_task(scaler.run(stop))
    await until(lambda: stand.endpoints.exists(), "the picker's file")
    stop.set()
    started = time.monotonic()
    await task
    assert time.monotonic() - started < 5
