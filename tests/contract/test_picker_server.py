"""The embedded endpoint picker as a process: its ports, its spans, and what happens when something is missing."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loopback import WAIT_S, Receiver, free_port, receiving, sample_sum, until

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from picking import (
    DISAGGREGATED,
    PREFIX_AWARE,
    chat,
    headers_removed,
    headers_set,
    request_body,
    request_headers,
    response_body,
    response_headers,
)

from llmtrace.picker.ext_proc import METHOD, SERVICE, ProcessingRequest, ProcessingResponse

DESTINATION = "x-gateway-destination-endpoint"
PREFILLER = "x-prefiller-host-port"
DROPPED_REASON = "x-llm-d-request-dropped-reason"
SPANS = sorted(
    (
        "gateway.request",
        "gateway.request_orchestration",
        "run_scheduler_profile",
        "filter_endpoints",
        "llm_d.epp.scoring",
        "llm_d.epp.scorer.prefix-cache-scorer",
        "llm_d.epp.scorer.queue-scorer",
        "llm_d.epp.scorer.kv-cache-utilization-scorer",
        "pick_endpoints",
    )
)
DISAGGREGATED_SPANS = {True: 17, False: 11}
"""Spans of a request that is split, and of one that is not."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PAGE = """\
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="smol"} 0.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="smol"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="smol"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="728",engine="0"} 1.0
"""
CHANNEL = (("grpc.enable_http_proxy", 0),)
PROMPT_S = 1.0
"""An answer that takes longer than this has waited for something."""
EXIT_S = 15.0
"""The process supervisor kills after this time."""


class ModelServer:
    """Metrics of a model server; ``hold`` makes them wait until ``release`` is set."""

    def __init__(self, page: str = PAGE, *, hold: bool = False, port: int = 0, role: str = "") -> None:
        self.labels = {"llm-d.ai/role": role} if role else {}
        self.scrapes = 0
        self.release = threading.Event()
        if not hold:
            self.release.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.scrapes += 1
                if not outer.release.wait(30):
                    return
                self.send_response(200 if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def model_servers(number: int = 2, page: str = PAGE) -> Iterator[list[ModelServer]]:
    servers = [ModelServer(page) for _ in range(number)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def write_endpoints(path: Path, servers: list[ModelServer]) -> None:
    """Replace the file in one step, as a careful writer does."""
    entries = [
        {"name": f"vllm-{server.port}", "address": "127.0.0.1", "port": str(server.port), "labels": server.labels}
        for server in servers
    ]
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"endpoints": entries}))
    new.replace(path)


class Running:
    """A picker in a process of its own."""

    def __init__(
        self, folder: Path, servers: list[ModelServer], content: dict[str, Any] = PREFIX_AWARE, **environment: str
    ) -> None:
        self.endpoints = folder / "endpoints.yaml"
        write_endpoints(self.endpoints, servers)
        discovery = {
            "name": "endpoints",
            "type": "file-discovery",
            "parameters": {"path": str(self.endpoints), "watchFile": True},
        }
        config = folder / "picker.yaml"
        config.write_text(yaml.safe_dump({**content, "plugins": [discovery, *content["plugins"][1:]]}))
        self.port, self.health_port, self.metrics_port = free_port(), free_port(), free_port()
        self.log = folder / "picker.log"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("OTEL_") and not name.lower().endswith("_proxy")
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "llmtrace.picker", "--pool-name", "smol", "--config-file", str(config)),
                    *("--grpc-port", str(self.port), "--grpc-health-port", str(self.health_port)),
                    *("--metrics-port", str(self.metrics_port), "--refresh-metrics-interval=100ms"),
                ],
                stderr=log,
                env={**inherited, "OTEL_BSP_SCHEDULE_DELAY": "100", **environment},
            )

    def health(self, service: str = SERVICE) -> object:
        """Status of a service; None where the health port does not answer or does not know it."""
        with grpc.insecure_channel(f"127.0.0.1:{self.health_port}", CHANNEL) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
            except grpc.RpcError:
                return None
            return answer.status

    def wait_until_serving(self) -> None:
        def serving() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"the picker ended with {self.process.returncode}:\n{self.log.read_text()}")
            return bool(self.health() == SERVING)

        until(serving, "the picker's start", 30)

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", trust_env=False).text

    def value(self, name: str, /, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        return sample_sum(self.metrics(), name, **labels)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def running(
    folder: Path, servers: list[ModelServer], content: dict[str, Any] = PREFIX_AWARE, **environment: str
) -> Iterator[Running]:
    picker = Running(folder, servers, content, **environment)
    try:
        picker.wait_until_serving()
        yield picker
    finally:
        picker.stop()


def exporting_to(receiver: Receiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ModelServer]]:
    with model_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def picker(
    tmp_path_factory: pytest.TempPathFactory, receiver: Receiver, servers: list[ModelServer]
) -> Iterator[Running]:
    environment = exporting_to(receiver) | {"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=epp-7"}
    with running(tmp_path_factory.mktemp("picker"), servers, **environment) as picker:
        yield picker


class Stream:
    """One ext_proc stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *messages: Any) -> None:
        for message in messages:
            await self.call.write(message)

    async def read(self) -> Any:
        """The next answer; None at the end of the stream."""
        answer = await asyncio.wait_for(self.call.read(), WAIT_S)
        return None if answer is grpc.aio.EOF else answer

    async def end(self) -> None:
        await self.call.done_writing()
        assert await self.read() is None
        assert await self.call.code() is grpc.StatusCode.OK


class Gateway:
    """The proxy's side of the picker's port."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._open = channel.stream_stream(
            METHOD,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )

    def stream(self, traceparent: str = "") -> Stream:
        return Stream(self._open(metadata=(("traceparent", traceparent),) if traceparent else ()))

    async def exchange(self, number: int = 0, prompt: str = "") -> str:
        """A whole exchange in trace ``number`` (0: in none); returns the destination, or the reason of its lack."""
        stream = self.stream(traceparent(number) if number else "")
        body = chat(prompt or f"Hello {number}")
        await stream.send(request_headers(x_request_id=f"r{number}"), request_body(body))
        routed = await stream.read()
        if routed.WhichOneof("response") == "immediate_response":
            assert await stream.read() is None
            return immediate(routed)
        assert body_of(await stream.read(), "request_body") == (body, True)
        await stream.send(response_headers())
        assert (await stream.read()).WhichOneof("response") == "response_headers"
        await stream.send(response_body(b"{}"))
        assert body_of(await stream.read(), "response_body") == (b"{}", True)
        await stream.end()
        if number:
            assert headers_set(routed)["traceparent"].split("-")[1] == trace_id(number)
        return headers_set(routed)[DESTINATION]

    async def exchange_until(self, destination: str, prompt: str = "") -> None:
        """Send exchanges until one has this destination."""
        deadline = time.monotonic() + WAIT_S
        while (found := await self.exchange(prompt=prompt)) != destination:
            assert time.monotonic() < deadline, f"still {found} instead of {destination}"
            await asyncio.sleep(0.02)


def immediate(answer: Any) -> str:
    """Status and dropped reason of an immediate response."""
    response = answer.immediate_response
    headers = {option.header.key: option.header.raw_value.decode() for option in response.headers.set_headers}
    return f"{response.status.code} {headers.get(DROPPED_REASON)}"


@asynccontextmanager
async def gateway_of(picker: Running) -> AsyncIterator[Gateway]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{picker.port}", CHANNEL) as channel:
        yield Gateway(channel)


@pytest.fixture
async def gateway(picker: Running) -> AsyncIterator[Gateway]:
    async with gateway_of(picker) as gateway:
        yield gateway


def trace_id(number: int) -> str:
    return f"{number:032x}"


def traceparent(number: int) -> str:
    return f"00-{trace_id(number)}-{number:016x}-01"


def body_of(answer: Any, part: str) -> tuple[bytes, bool]:
    assert answer.WhichOneof("response") == part
    streamed = getattr(answer, part).response.body_mutation.streamed_response
    return streamed.body, streamed.end_of_stream


def refusing_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_health(picker: Running) -> None:
    assert picker.health("") == SERVING
    assert picker.health(SERVICE) == SERVING
    assert picker.health("another.Service") is None


async def test_an_exchange_is_answered_in_order(
    gateway: Gateway, picker: Running, receiver: Receiver, servers: list[ModelServer]
) -> None:
    body = chat("word " * 200, stream=True)
    events = [
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n',
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 200, "completion_tokens": 2}}\n\ndata: [DONE]\n\n',
    ]
    stream = gateway.stream(traceparent(0xA1))
    await stream.send(
        request_headers(x_request_id="whole"),
        request_body(body[:100], end_of_stream=False),
        request_body(body[100:], end_of_stream=False),
    )
    first = asyncio.ensure_future(stream.call.read())
    assert not (await asyncio.wait({first}, timeout=0.1))[0], "nothing is answered before the body is complete"
    await stream.send(request_body(b""))
    routed = await asyncio.wait_for(first, WAIT_S)

    assert routed.WhichOneof("response") == "request_headers"
    sent = headers_set(routed)
    assert sent[DESTINATION] in {server.address for server in servers}
    assert routed.request_headers.response.clear_route_cache
    assert routed.dynamic_metadata["envoy.lb"][DESTINATION] == sent[DESTINATION]
    assert body_of(await stream.read(), "request_body") == (body, True)

    await stream.send(response_headers(content_type="text/event-stream"))
    assert (await stream.read()).WhichOneof("response") == "response_headers"
    for event in events:
        await stream.send(response_body(event, end_of_stream=False))
        assert body_of(await stream.read(), "response_body") == (event, False)
    await stream.send(response_body(b""))
    assert body_of(await stream.read(), "response_body") == (b"", True)
    await stream.end()

    spans = receiver.wait(trace_id(0xA1), len(SPANS))
    assert sorted(span.name for span in spans) == SPANS
    (top,) = [span for span in spans if span.name == "gateway.request"]
    assert top.parent_id == f"{0xA1:016x}", "the context in the stream's metadata is the parent"
    assert sent["traceparent"] == f"00-{trace_id(0xA1)}-{top.span_id}-01", "the model server hangs under it"
    assert (top.status, top.attributes["http.response.status_code"]) == ("UNSET", 200)
    assert (top.attributes["gen_ai.usage.input_tokens"], top.attributes["gen_ai.usage.output_tokens"]) == (200, 2)
    for span in spans:
        assert span.resource["service.name"] == "llm-d-epp"
        assert span.resource["service.instance.id"] == "epp-7"


async def test_metrics_have_the_names_of_llm_d(gateway: Gateway, picker: Running, servers: list[ModelServer]) -> None:
    labels = {"model_name": "smol", "target_model_name": "smol", "fairness_id": "default-flow", "priority": "0"}
    before = picker.value("llm_d_epp_request_total", **labels)
    await gateway.exchange(prompt="word " * 200)
    until(
        lambda: picker.value("llm_d_epp_request_duration_seconds_count", **labels) == before + 1, "the exchange's end"
    )
    assert picker.value("llm_d_epp_request_total", **labels) == before + 1
    for name in (
        "request_size_bytes_count",
        "response_size_bytes_count",
        "request_ttft_seconds_count",
        "request_processing_duration_seconds_count",
        "scheduler_e2e_duration_seconds_count",
        "scheduler_attempts_total",
        "plugin_duration_seconds_count",
        "prefix_indexer_size",
        "prefix_indexer_hit_ratio_count",
    ):
        assert picker.value(f"llm_d_epp_{name}") > 0, name
    assert picker.value("llm_d_epp_request_running") == 0
    assert picker.value("llm_d_epp_ready_endpoints", name="smol") == len(servers)
    assert picker.value("llm_d_epp_average_kv_cache_utilization", name="smol") == 0.25
    assert picker.value("llm_d_epp_average_queue_size", name="smol") == 0
    assert picker.value("llm_d_epp_average_running_requests", name="smol") == 0
    page = picker.metrics()
    assert "# TYPE llm_d_epp_request_total counter" in page
    assert f'llm_d_epp_per_endpoint_queue_size{{model_server_endpoint="vllm-{servers[0].port}",name="smol"}}' in page


async def test_a_malformed_request_is_answered_by_the_picker(gateway: Gateway, picker: Running) -> None:
    stream = gateway.stream()
    await stream.send(request_headers(), request_body(b"{"))
    answer = await stream.read()
    assert answer.immediate_response.status.code == 400
    assert await stream.read() is None
    until(lambda: picker.value("llm_d_epp_request_error_total", error_code="BadRequest") == 1, "the error's count")


@pytest.mark.parametrize("responding", [False, True])
async def test_a_cancelled_stream_leaves_nothing_running(
    gateway: Gateway, picker: Running, receiver: Receiver, responding: bool
) -> None:
    def errors() -> float:
        return picker.value("llm_d_epp_request_error_total", error_code="ClientDisconnect")

    number = 0xB1 + responding
    before = errors()
    stream = gateway.stream(traceparent(number))
    await stream.send(request_headers(), request_body(chat("word " * 200)))
    await stream.read()
    await stream.read()
    assert picker.value("llm_d_epp_request_running") == 1
    if responding:
        await stream.send(
            response_headers(content_type="text/event-stream"), response_body(b"data: {}\n\n", end_of_stream=False)
        )
        await stream.read()
        await stream.read()
    stream.call.cancel()
    until(lambda: picker.value("llm_d_epp_request_running") == 0, "the end of the exchange")
    until(lambda: errors() == before + 1, "the error ClientDisconnect", 2)
    spans = {span.name: span for span in receiver.wait(trace_id(number), len(SPANS))}
    assert sorted(spans) == SPANS
    assert spans["gateway.request"].status == "ERROR"


async def test_many_exchanges_at_once(gateway: Gateway, picker: Running, servers: list[ModelServer]) -> None:
    number = 50
    found = await asyncio.wait_for(asyncio.gather(*(gateway.exchange(0xC00 + n) for n in range(number))), WAIT_S)
    assert len(found) == number
    assert set(found) <= {server.address for server in servers}
    until(lambda: picker.value("llm_d_epp_request_running") == 0, "the end of all exchanges")


async def test_the_sidecar_is_told_where_to_prefill_by_the_picker_alone(tmp_path: Path) -> None:
    """x-prefiller-host-port names the prefill server of a request that is split, whatever a client sent; else it goes.

    Sources: llm-d-router, pkg/common/routing/common.go and pkg/sidecar/proxy/chat_completions.go.
    """
    with (
        closing(ModelServer(role="prefill")) as prefill,
        closing(ModelServer(role="decode")) as decode,
        receiving() as receiver,
        running(tmp_path, [prefill, decode], DISAGGREGATED, **exporting_to(receiver)) as picker,
    ):
        async with gateway_of(picker) as gateway:
            for number, injected in ((0xE1, {}), (0xE2, {}), (0xE3, {PREFILLER: "127.0.0.1:1"})):
                stream = gateway.stream(traceparent(number))
                headers = {key.replace("-", "_"): value for key, value in injected.items()}
                await stream.send(request_headers(**headers), request_body(chat("word " * 600)))
                routed = await stream.read()
                assert headers_set(routed)[DESTINATION] == decode.address
                split = number == 0xE1
                assert headers_set(routed).get(PREFILLER) == (prefill.address if split else None)
                assert (PREFILLER in headers_removed(routed)) == (not split)
                stream.call.cancel()
                spans = receiver.wait(trace_id(number), DISAGGREGATED_SPANS[split])
                (why,) = [span.attributes for span in spans if span.name == "prepare_disaggregation"]
                assert why["llmtrace.pd.decision"] == ("split" if split else "unified")
                assert why["llmtrace.pd.decode_endpoint"] == f"default/vllm-{decode.port}"
                assert why["llmtrace.pd.decode_waiting"] == 0, "as the scrape said"
        for decision, count in (("prefill-decode", 1), ("decode-only", 2)):
            labels = {"model_name": "smol", "decision_type": decision}
            assert picker.value("llm_d_epp_disagg_decision_total", **labels) == count


async def test_endpoints_are_replaced_while_running(tmp_path: Path) -> None:
    with model_servers() as (old, new), running(tmp_path, [old], OTEL_SDK_DISABLED="true") as picker:
        async with gateway_of(picker) as gateway:
            assert await gateway.exchange() == old.address
            write_endpoints(picker.endpoints, [new])
            await gateway.exchange_until(new.address)
            until(lambda: picker.value("llm_d_epp_ready_endpoints") == 1, "one endpoint")
            assert await gateway.exchange() == new.address


async def test_endpoints_that_are_replaced_during_the_start_are_not_missed(tmp_path: Path) -> None:
    old, new = ModelServer(hold=True), ModelServer()
    picker = Running(tmp_path, [old], OTEL_SDK_DISABLED="true")
    try:
        until(lambda: old.scrapes, "the first scrape", 30)
        write_endpoints(picker.endpoints, [new])
        old.release.set()
        picker.wait_until_serving()
        async with gateway_of(picker) as gateway:
            await gateway.exchange_until(new.address)
    finally:
        picker.stop()
        old.close()
        new.close()


async def test_no_endpoint_is_left(tmp_path: Path) -> None:
    with model_servers() as servers, running(tmp_path, servers, OTEL_SDK_DISABLED="true") as picker:
        async with gateway_of(picker) as gateway:
            assert await gateway.exchange() in {server.address for server in servers}
            for server in servers:
                server.close()
            stopped = time.monotonic()
            await gateway.exchange_until("503 rejected-no-endpoints")
            assert time.monotonic() - stopped < 2, "a refused connection tells at the next scrape"
            assert picker.value("llm_d_epp_ready_endpoints") == 0
            again = ModelServer(port=servers[0].port)
            try:
                await gateway.exchange_until(again.address)
            finally:
                again.close()


async def test_a_server_that_hangs_does_not_hold_up_the_others(tmp_path: Path) -> None:
    hanging = ModelServer()
    with model_servers(1) as (other,), running(tmp_path, [hanging, other], OTEL_SDK_DISABLED="true") as picker:
        try:
            hanging.release.clear()
            seen = hanging.scrapes
            until(lambda: hanging.scrapes > seen, "the scrape that hangs")
            before = other.scrapes
            until(lambda: other.scrapes >= before + 5, "five scrapes of the other server", 1.5)
            async with gateway_of(picker) as gateway:
                await asyncio.wait_for(gateway.exchange(), PROMPT_S)
        finally:
            hanging.close()


@pytest.mark.parametrize(("usual", "value"), [("} 0.0", "} +Inf"), ("} 0.25", "} NaN")])
async def test_a_strange_page_of_metrics_does_no_harm(tmp_path: Path, usual: str, value: str) -> None:
    strange = ModelServer(PAGE.replace(usual, value))
    try:
        with model_servers(1) as (other,), running(tmp_path, [strange, other], OTEL_SDK_DISABLED="true") as picker:
            before = other.scrapes
            until(lambda: other.scrapes >= before + 3, "three more scrapes of the other server", 3)
            async with gateway_of(picker) as gateway:
                assert await gateway.exchange() in {strange.address, other.address}
            for name in ("average_kv_cache_utilization", "average_queue_size", "average_running_requests"):
                assert math.isfinite(picker.value(f"llm_d_epp_{name}")), name
    finally:
        strange.close()


async def test_spans_are_flushed_and_open_exchanges_finished_at_the_end(tmp_path: Path) -> None:
    with (
        receiving() as receiver,
        model_servers(1) as servers,
        running(tmp_path, servers, **exporting_to(receiver), OTEL_BSP_SCHEDULE_DELAY="60000") as picker,
    ):
        async with gateway_of(picker) as gateway:
            await gateway.exchange(0xD1, prompt="word " * 200)
            stream = gateway.stream(traceparent(0xD2))
            await stream.send(request_headers(), request_body(chat("word " * 200)))
            await stream.read()
            await stream.read()
            assert not receiver.of(trace_id(0xD1)), "the batch is not due yet"
            picker.process.send_signal(signal.SIGTERM)
            until(lambda: picker.health() == NOT_SERVING, "the picker to say that it stops")
            await stream.send(response_headers(), response_body(b"{}"))
            assert (await stream.read()).WhichOneof("response") == "response_headers"
            assert body_of(await stream.read(), "response_body") == (b"{}", True)
            await stream.end()
        assert picker.process.wait(EXIT_S) == 0, picker.log.read_text()
        for number in (0xD1, 0xD2):
            assert sorted(span.name for span in receiver.of(trace_id(number))) == SPANS
        assert "Traceback" not in picker.log.read_text()


async def test_without_a_collector_requests_are_answered_and_the_end_comes(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{refusing_port()}"
    with model_servers(1) as servers, running(tmp_path, servers, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as picker:
        async with gateway_of(picker) as gateway:
            for number in range(0xE01, 0xE15):
                await asyncio.wait_for(gateway.exchange(number), PROMPT_S)
            abandoned = gateway.stream()
            await abandoned.send(request_headers(), request_body(chat()))
            await abandoned.read()
            picker.process.send_signal(signal.SIGTERM)
            try:
                code = await asyncio.to_thread(picker.process.wait, EXIT_S)
            except subprocess.TimeoutExpired:
                pytest.fail(f"the picker still runs {EXIT_S} s after SIGTERM:\n{picker.log.read_text()}")
        assert code == 0
        assert "Traceback" not in picker.log.read_text()
