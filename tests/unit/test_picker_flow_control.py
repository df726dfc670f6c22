"""Flow control: who waits, how long, what answers those who waited in vain, and the traces and metrics of it."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from picking import FLOW_CONTROLLED, Handle, Picker, chat, endpoint, request_body, request_headers
from pydantic import ValidationError
from test_semconv_senders import findings

from llmtrace.picker import config
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.exchange import Exchange
from llmtrace.picker.flow_control import DISPATCH_S
from llmtrace.picker.plugins.concurrency_detector import ConcurrencyDetector, ConcurrencyParameters
from llmtrace.picker.plugins.utilization_detector import UtilizationDetector, UtilizationParameters
from llmtrace.picker.request import InferenceRequest
from llmtrace.semconv import attributes as a

MODEL = {"model_name": "smol", "target_model_name": "smol", "priority": "0", "fairness_id": "default-flow"}
QUEUE = {**MODEL, "inference_pool": "pool"}


def content(**flow: Any) -> dict[str, Any]:
    made = copy.deepcopy(FLOW_CONTROLLED)
    made["flowControl"] |= flow
    return made


@asynccontextmanager
async def dispatching(picker: Picker) -> AsyncIterator[None]:
    assert picker.flow_control is not None
    task = asyncio.create_task(picker.flow_control.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def ask(picker: Picker) -> tuple[Exchange, list[Any]]:
    exchange = Exchange(picker.services, {})
    await exchange.handle(request_headers())
    return exchange, await exchange.handle(request_body(chat()))


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(DISPATCH_S)


def queued(picker: Picker) -> float | None:
    return picker.value("llm_d_epp_flow_control_queue_size", **QUEUE)


def test_an_idle_pool_lets_requests_pass_at_once(tmp_path: Path) -> None:
    picker = Picker(tmp_path, FLOW_CONTROLLED)
    exchange = picker.exchange()  # one that must not wait
    exchange.handle(request_headers())
    exchange.handle(request_body(chat()))
    exchange.close()
    span = picker.span(a.FLOW_SPAN)
    assert span.attributes == {a.FLOW_OUTCOME: "Dispatched", a.FLOW_QUEUE_SIZE: 0, a.FLOW_SATURATION: 0.0}
    assert span.parent_id == picker.span(a.ORCHESTRATION_SPAN).span_id
    counted = {"outcome": "Dispatched", "priority": "0", "inference_pool": "pool"}
    assert picker.value("llm_d_epp_flow_control_requests_total", **counted) == 1.0
    assert queued(picker) == 0.0


async def test_requests_wait_while_the_pool_is_saturated_and_go_in_their_order(tmp_path: Path) -> None:
    picker = Picker(tmp_path, FLOW_CONTROLLED, [endpoint(0, waiting=2), endpoint(1, waiting=3)])
    done: list[int] = []

    async def one(number: int) -> None:
        exchange, answers = await ask(picker)
        assert answers
        done.append(number)
        exchange.close(cancelled=True)

    async with dispatching(picker):
        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(one(number)))
            await until(lambda n=number: queued(picker) == n + 1.0)
        await asyncio.sleep(5 * DISPATCH_S)
        assert done == []
        assert picker.value("llm_d_epp_request_running", **MODEL) in (None, 0.0)
        assert picker.value("llm_d_epp_flow_control_queue_bytes", **QUEUE) == 3.0 * len(chat())
        saturation = {"inference_pool": "pool", "stage": "effective"}
        assert picker.value("llm_d_epp_flow_control_pool_saturation", **saturation) == 1.25
        for each in picker.handle.pool:
            each.load.waiting = 0
        await asyncio.gather(*tasks)
    assert done == [0, 1, 2]
    assert queued(picker) == 0.0
    waits = sorted((s for s in picker.spans if s.name == a.FLOW_SPAN), key=lambda s: s.start_ns)
    assert [s.attributes[a.FLOW_QUEUE_SIZE] for s in waits] == [0, 1, 2]
    assert all(s.duration_ms >= 5 * DISPATCH_S * 1e3 for s in waits)
    assert findings(picker.spans, a.PICKER_SERVICE) == []


@pytest.mark.parametrize(
    ("endpoints", "status", "reason", "outcome"),
    [
        ([endpoint(0, waiting=9)], 429, "rejected-ttl-expired", "EvictedTTL"),
        ([], 503, "rejected-no-endpoints", "EvictedNoEndpoints"),
    ],
)
async def test_a_request_that_waits_too_long(
    tmp_path: Path, endpoints: list[Endpoint], status: int, reason: str, outcome: str
) -> None:
    picker = Picker(tmp_path, content(defaultRequestTTL="50ms"), endpoints)
    for each in endpoints:
        each.answered_at = time.monotonic()
    async with dispatching(picker):
        exchange, (answer,) = await ask(picker)
    exchange.close()
    immediate = answer.immediate_response
    headers = {h.header.key: h.header.raw_value.decode() for h in immediate.headers.set_headers}
    assert (immediate.status.code, headers) == (status, {a.DROPPED_REASON_HEADER: reason})
    assert picker.span(a.FLOW_SPAN).attributes[a.FLOW_OUTCOME] == outcome
    assert findings(picker.spans, a.PICKER_SERVICE) == []


async def test_a_pool_without_endpoints_has_a_time_of_its_own(tmp_path: Path) -> None:
    picker = Picker(tmp_path, content(defaultRequestTTL="50ms", noEndpointRequestTTL="30s"), [])
    async with dispatching(picker):
        task = asyncio.create_task(ask(picker))
        await asyncio.sleep(0.15)
        assert not task.done()
        picker.handle.pool.replace([endpoint(0)])
        exchange, answers = await task
    assert not exchange.answered
    assert answers
    exchange.close(cancelled=True)


@pytest.mark.parametrize(
    ("endpoints", "status", "outcome"), [(1, 429, "RejectedCapacity"), (0, 503, "RejectedNoEndpoints")]
)
async def test_a_full_queue_refuses(tmp_path: Path, endpoints: int, status: int, outcome: str) -> None:
    picker = Picker(tmp_path, content(maxRequests=1), [endpoint(n, waiting=9) for n in range(endpoints)])
    waiting = asyncio.create_task(ask(picker))
    await until(lambda: queued(picker) == 1.0)
    exchange, (answer,) = await ask(picker)
    assert answer.immediate_response.status.code == status
    exchange.close()
    assert picker.span(a.FLOW_SPAN).attributes[a.FLOW_OUTCOME] == outcome
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_client_that_goes_away_leaves_the_queue(tmp_path: Path) -> None:
    picker = Picker(tmp_path, FLOW_CONTROLLED, [endpoint(0, waiting=9)])
    exchange = Exchange(picker.services, {})
    await exchange.handle(request_headers())
    task = asyncio.create_task(exchange.handle(request_body(chat())))
    await until(lambda: queued(picker) == 1.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    exchange.close(cancelled=True)
    assert queued(picker) == 0.0
    assert picker.span(a.FLOW_SPAN).attributes[a.FLOW_OUTCOME] == "EvictedContextCancelled"
    picker.handle.pool.replace([endpoint(1)])
    async with dispatching(picker):
        following, answers = await ask(picker)
    assert answers
    following.close(cancelled=True)


def detector(**parameters: Any) -> UtilizationDetector:
    made = UtilizationParameters.model_validate({"metricsStalenessThreshold": "5s", **parameters})
    return UtilizationDetector("detector", made, Handle())


def concurrency(**parameters: Any) -> ConcurrencyDetector:
    return ConcurrencyDetector("detector", ConcurrencyParameters.model_validate(parameters), Handle())


@pytest.mark.parametrize(
    ("endpoints", "saturation", "stale"),
    [
        ([], 1.0, 0),  # nobody to serve
        ([{"waiting": 0}], 0.0, 0),
        ([{"waiting": 5}], 1.0, 0),
        ([{"waiting": 15}, {"waiting": 0}], 1.5, 0),
        ([{"waiting": 1, "kv_cache_usage": 0.4}], 0.5, 0),  # the scarcer of the two
        ([{"waiting": 0}, {"ready": False}], 0.5, 1),  # old metrics count as saturated
    ],
)
def test_the_saturation_of_a_pool(endpoints: list[dict[str, Any]], saturation: float, stale: int) -> None:
    """llm-d's formula: the mean of max(queue / threshold, cache / threshold)."""
    found = detector()
    assert found.saturation([endpoint(n, **load) for n, load in enumerate(endpoints)]) == pytest.approx(saturation)
    assert found.stale == stale


def test_the_detector_filters_what_is_over_its_limits() -> None:
    calm, busy, full = endpoint(0, waiting=1), endpoint(1, waiting=6), endpoint(2, kv_cache_usage=0.9)
    request = InferenceRequest("r")
    assert detector().filter(request, [calm, busy, full]) == [calm]
    assert detector(headroom=0.5).filter(request, [calm, busy, full]) == [calm, busy, full]
    assert detector().filter(request, [busy, full]) == [busy, full]  # rather one of them than none


async def test_each_stage_counts_by_itself(tmp_path: Path) -> None:
    prefill, decode, both = endpoint(0, waiting=9), endpoint(1, waiting=0), endpoint(2, waiting=0)
    prefill.labels, both.labels = {"llm-d.ai/role": "prefill"}, {"llm-d.ai/role": "prefill-decode"}
    picker = Picker(tmp_path, content(), [prefill, decode, both])
    assert picker.flow_control is not None
    assert picker.flow_control.stages() == {"prefill": 2.25, "decode": 0.0, "effective": 2.25}


def test_the_gate_alone_brings_the_defaults(tmp_path: Path) -> None:
    made = {k: v for k, v in FLOW_CONTROLLED.items() if k != "flowControl"}
    made["plugins"] = made["plugins"][:-1]
    picker = Picker(tmp_path, made)
    flow = picker.configuration.flow_control
    assert flow is not None
    assert (flow.max_requests, flow.ttl_s, flow.no_endpoint_ttl_s) == (5000, 60.0, 60.0)
    assert isinstance(flow.detector, UtilizationDetector)
    assert flow.detector.parameters.queue_depth_threshold == 5


def test_a_time_to_live_of_zero_is_without_end() -> None:
    section = config.FlowControlSection.model_validate({"defaultRequestTTL": "0s", "noEndpointRequestTTL": "2m"})
    assert (section.default_request_ttl, section.no_endpoint_request_ttl) == (0.0, 120.0)


def test_the_saturation_by_requests_in_flight() -> None:
    """llm-d's formula: all requests in flight over all that there may be, so that an idle endpoint makes room."""
    found = concurrency(maxConcurrency=4, headroom=0.5)
    busy, idle = endpoint(0), endpoint(1)
    busy.in_flight = 6
    assert (found.saturation([]), found.saturation([busy]), found.saturation([busy, idle])) == (1.0, 1.5, 0.75)
    assert found.filter(InferenceRequest("r"), [busy, idle]) == [idle]
    assert found.filter(InferenceRequest("r"), [busy]) == []
    busy.in_flight = 5
    assert found.filter(InferenceRequest("r"), [busy, idle]) == [busy, idle]


def test_tokens_in_flight_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="concurrencyMode"):
        concurrency(concurrencyMode="tokens")


async def test_a_queue_does_not_run_into_one_endpoint_between_two_scrapes(tmp_path: Path) -> None:
    made = content(saturationDetector={"pluginRef": "concurrency-detector"})
    made["plugins"][-1] = {"type": "concurrency-detector", "parameters": {"maxConcurrency": 2}}
    made["flowControl"]["maxRequests"] = 10
    picker = Picker(tmp_path, made, [endpoint(0)])
    (server,) = picker.handle.pool
    async with dispatching(picker):
        tasks = [asyncio.create_task(ask(picker)) for _ in range(5)]
        await until(lambda: queued(picker) == 3.0)
        await asyncio.sleep(5 * DISPATCH_S)
        assert (server.in_flight, queued(picker)) == (2, 3.0)
        for task in tasks:
            exchange, answers = await task
            assert answers
            exchange.close(cancelled=True)
    assert server.in_flight == 0
