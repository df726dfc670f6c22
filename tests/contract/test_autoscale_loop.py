"""From demand to capacity: a real picker's queue, the scaler, a new replica, the picker's file, the requests served."""

from __future__ import annotations

import asyncio
import copy
import sys
from pathlib import Path

import pytest
from loopback import sample_sum
from test_picker_server import Running, gateway_of, running

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from picking import FLOW_CONTROLLED
from scaling import Replica, Stand
from scaling import until as until_async

from llmtrace.semconv import attributes as a

QUEUE = "llm_d_epp_flow_control_queue_size"
RUNNING = "llm_d_epp_request_running"


class Busy(Replica):
    """A model server with so many requests waiting."""

    waiting = 9

    def page(self, path: str) -> tuple[int, str]:
        status, text = super().page(path)
        return status, text.replace(
            'num_requests_waiting{engine="0"} 0.0', f'num_requests_waiting{{engine="0"}} {self.waiting}.0'
        )


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    made = Stand(tmp_path)
    made.replicas["vllm-0"] = Busy(running=True, tokens=1)
    made.processes.replicas["vllm-0"] = made.replicas["vllm-0"]
    return made


def counted(picker: Running) -> tuple[float, float]:
    page = picker.metrics()
    return sample_sum(page, QUEUE, model_name="smol"), sample_sum(page, RUNNING, model_name="smol")


async def test_waiting_requests_get_a_replica_of_their_own(stand: Stand, tmp_path: Path) -> None:
    content = copy.deepcopy(FLOW_CONTROLLED)
    content["flowControl"]["maxRequests"] = 10
    with stand.serving(), running(tmp_path, [], content, OTEL_SDK_DISABLED="true") as picker:
        stand.options["endpoints"] = picker.endpoints
        stand.endpoints = picker.endpoints
        scaler = stand.scaler()
        await scaler.begin()
        assert stand.listed() == ["vllm-0"]
        async with gateway_of(picker) as gateway:
            waiting = [asyncio.create_task(gateway.exchange(prompt=f"Report {n}")) for n in range(2)]
            await until_async(lambda: counted(picker)[0] == 2.0, "both requests in the queue")
            assert not any(task.done() for task in waiting)
            stand.load.queue, stand.load.running = counted(picker)
            await scaler.tick()
            await until_async(lambda: stand.listed() == ["vllm-0", "vllm-1"], "the new replica in the picker's file")
            # vllm-0 alone is still at 4.5 times its threshold; the mean of both is what saturates the pool.
            stand.replicas["vllm-0"].waiting = 3  # type: ignore[attr-defined]
            served = await asyncio.wait_for(asyncio.gather(*waiting), 10)
            assert set(served) == {stand.address("vllm-1")}
        assert counted(picker)[0] == 0.0
        stand.replicas["vllm-1"].tokens = 1
        await until_async(lambda: not any(d.open for d in scaler.state.decisions), "the decision's effect")
        await scaler.send()
        await scaler.close()
    (trace,) = stand.traces()
    (root,) = trace.roots
    assert (root.attributes[a.SCALE_VALUE], root.attributes[a.REPLICAS_DESIRED]) == (2.0, 2)
    assert trace.named(a.FIRST_REQUEST_SPAN)
