"""The sidecar as a process: started as llm-d's is, its spans, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from loopback import Receiver, free_port, receiving, until

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from sidecaring import CHAT, DECODED, TRACE, TRACEPARENT, Seen, chunked, prefilled, says, serving

EXIT_S = 15.0


class Running:
    """A sidecar in a process of its own."""

    def __init__(self, folder: Path, server_port: int, *flags: str, **environment: str) -> None:
        self.port = free_port()
        self.log = folder / "sidecar.log"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("OTEL_") and not name.lower().endswith("_proxy")
        }
        command = [sys.executable, "-m", "llmtrace.sidecar", f"--port={self.port}", f"--vllm-port={server_port}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--kv-connector=nixlv2", *flags],
                stderr=log,
                env={**inherited, "OTEL_BSP_SCHEDULE_DELAY": "100", **environment},
            )

    def listening(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the sidecar ended with {self.process.returncode}:\n{self.log.read_text()}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(EXIT_S)


@contextmanager
def running(folder: Path, server_port: int, *flags: str, **environment: str) -> Iterator[Running]:
    sidecar = Running(folder, server_port, *flags, **environment)
    try:
        until(sidecar.listening, "the sidecar's start", 30)
        yield sidecar
    finally:
        if sidecar.process.poll() is None:
            sidecar.process.kill()
        sidecar.process.wait()


def client(sidecar: Running, scheme: str = "http") -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{scheme}://127.0.0.1:{sidecar.port}", trust_env=False, verify=False, timeout=EXIT_S
    )


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


async def test_its_spans_reach_a_collector(tmp_path: Path, receiver: Receiver) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=d-0"}
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode:
        with running(tmp_path, decode.port, "--secure-proxy=false", "--tracing", **environment) as sidecar:
            async with client(sidecar) as http:
                headers = {"traceparent": TRACEPARENT, "x-prefiller-host-port": prefill.address}
                response = await http.post(CHAT, json={"model": "CANARY"}, headers=headers)
            spans = await asyncio.to_thread(receiver.wait, TRACE, 6)
            assert sidecar.end() == 0
            log = sidecar.log.read_text()
    assert response.status_code == 200
    assert sorted(span.name for span in spans) == [
        *("HTTP POST", "HTTP POST", "decode", "forward_request", f"llm_d.pd_proxy.POST {CHAT}", "prefill")
    ]
    assert {span.resource["service.name"] for span in spans} == {"llm-d-disagg-sidecar"}
    assert {span.resource["service.instance.id"] for span in spans} == {"d-0"}
    assert "CANARY" not in log
    (line,) = log.splitlines()
    assert line.endswith(
        f"INFO llmtrace.sidecar.server: http://127.0.0.1:{sidecar.port} in front of http://localhost:{decode.port}"
    )


async def test_without_tracing_nothing_is_sent_and_the_context_goes_on(tmp_path: Path, receiver: Receiver) -> None:
    other = TRACEPARENT.replace(TRACE, "1" * 32)
    async with serving(says(DECODED)) as decode:
        with running(
            tmp_path, decode.port, "--secure-proxy=false", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url
        ) as sidecar:
            async with client(sidecar) as http:
                await http.post(CHAT, json={}, headers={"traceparent": other})
            assert sidecar.end() == 0
    assert decode.requests[0].get("traceparent") == other
    assert receiver.of("1" * 32) == []


async def test_tls_is_the_default(tmp_path: Path) -> None:
    async with serving(says(DECODED)) as decode:
        with running(tmp_path, decode.port) as sidecar:
            async with client(sidecar, "https") as http:
                assert (await http.post(CHAT, json={})).status_code == 200
            async with client(sidecar) as http:
                with pytest.raises(httpx.HTTPError):
                    await http.post(CHAT, json={})


async def test_a_response_that_breaks_off_is_one_line_in_the_log(tmp_path: Path) -> None:
    async def breaks(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(b"data: CANARY\n\n"))
        await writer.drain()
        writer.close()

    async with serving(breaks) as decode:
        with running(tmp_path, decode.port, "--secure-proxy=false") as sidecar:
            async with client(sidecar) as http:
                with pytest.raises(httpx.RemoteProtocolError):
                    await http.post(f"{CHAT}%0A", json={"model": "CANARY"})
            assert sidecar.end() == 0
    _, line = sidecar.log.read_text().splitlines()
    broken = f"the response broke off: localhost:{decode.port} broke off"
    assert line.endswith(f"WARNING llmtrace.sidecar.exchange: '{CHAT}\\n': {broken}")


async def test_a_running_request_ends_before_the_sidecar(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def slowly(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.wait_for(go_on.wait(), EXIT_S)
        await says(DECODED)(seen, writer)

    async with serving(slowly) as decode:
        with running(tmp_path, decode.port, "--secure-proxy=false") as sidecar:
            async with client(sidecar) as http:
                request = asyncio.create_task(http.post(CHAT, json={}))
                await asyncio.wait_for(decode.arrived.wait(), EXIT_S)
                sidecar.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(until, lambda: not sidecar.listening(), "the port to close")
                go_on.set()
                assert (await request).status_code == 200
            assert sidecar.process.wait(EXIT_S) == 0


async def test_a_collector_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with serving(says(DECODED)) as decode:
        with running(
            tmp_path, decode.port, "--secure-proxy=false", "--tracing=true", OTEL_EXPORTER_OTLP_ENDPOINT=nowhere
        ) as sidecar:
            async with client(sidecar) as http:
                for _ in range(5):
                    assert (await http.post(CHAT, json={}, headers={"traceparent": TRACEPARENT})).status_code == 200
            assert sidecar.end(signal.SIGINT) == 0


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "llmtrace.sidecar", f"--port={port}", "--secure-proxy=false"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"llmtrace.sidecar: cannot listen on 127.0.0.1:{port} (")
    assert line.endswith("stop what listens there, or give another --bind-address or --port")
