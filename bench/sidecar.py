"""Measures what the sidecar adds to a request, unified and split, traced and not.

``python -m bench.sidecar [--seconds N] [--unsampled] [--json]``. Unified: through the sidecar against the decode server
itself. Split: through the sidecar against a client that does both legs itself. The servers are trivial, prompts have
4 kB, answers are streams of eight events; both ways take turns in one run. Spans are sent to a sink that counts and
drops them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench.processes import free_ports, process, wait
from bench.sink import sink

PATH = "/v1/chat/completions"
PROMPT_BYTES = 4096
EVENTS = 8
ROUNDS = 4
CONNECTIONS = (1, 8)
START_TIMEOUT_S = 30
PARAMS = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2, 3]], "remote_port": 5600}
PREFILLED = {"id": "p", "kv_transfer_params": PARAMS, "usage": {"prompt_tokens": 900, "completion_tokens": 1}}
KINDS = ("unified", "split")


def response(content: bytes, kind: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


def stream() -> bytes:
    events = [b'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\n\n'] * EVENTS + [b"data: [DONE]\n\n"]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + chunks + b"0\r\n\r\n"


class ModelServer(asyncio.Protocol):
    """Answers each complete request at once: a prefill leg with its params, anything else with a stream."""

    answers = (stream(), response(json.dumps(PREFILLED).encode(), "application/json"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if separator and len(body) >= int(length or 0):
            self._received = b""
            self._transport.write(self.answers[b'"do_remote_decode":true' in body])  # type: ignore[attr-defined]


class Connection(asyncio.Protocol):
    """A connection that is kept, with one request at a time."""

    def __init__(self) -> None:
        self._received = b""
        self._first = 0.0
        self._answer: asyncio.Future[float] | None = None

    @classmethod
    async def open(cls, port: int) -> Connection:
        return (await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port))[1]

    async def ask(self, request: bytes) -> float:
        """Send a request, and return when the first part of its answer's body came, once the answer is complete."""
        self._received, self._first = b"", 0.0
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined]
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        if not body or self._answer is None:
            return
        self._first = self._first or time.perf_counter()
        chunked = b"transfer-encoding: chunked" in head.lower()
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if body.endswith(b"0\r\n\r\n") if chunked else len(body) >= int(length):
            assert head.startswith(b"HTTP/1.1 200"), head
            self._answer.set_result(self._first)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the connection was closed within an answer"))


def request(number: int, headers: dict[str, str], **fields: Any) -> bytes:
    content = f"{'word ' * (PROMPT_BYTES // 5)} question {number}"
    body = {"model": "bench", "messages": [{"role": "user", "content": content}], "stream": True, **fields}
    raw = json.dumps(body, separators=(",", ":")).encode()
    lines = {"host": "bench", "content-type": "application/json", "content-length": str(len(raw)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + raw


@dataclass
class Times:
    """Times of one way, in seconds: to the first part of the answer, and to its end."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        whole = sorted(self.whole)
        return {
            "ttft_p50_ms": statistics.median(self.first) * 1e3,
            "p50_ms": statistics.median(whole) * 1e3,
            "p99_ms": whole[int(len(whole) * 0.99)] * 1e3,
            "requests_per_s": len(whole) / self.seconds,
        }


Way = Callable[[int], Awaitable[float]]


async def ways(ports: dict[str, int], *, sampled: bool) -> dict[str, dict[str, Way]]:
    """For each kind of request, a function for each way that serves one on connections of its own."""
    sidecar = await Connection.open(ports["sidecar"])
    decode = await Connection.open(ports["decode"])
    prefill = await Connection.open(ports["prefill"])
    flags = "01" if sampled else "00"

    def trace() -> dict[str, str]:
        return {"traceparent": f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-{flags}"}

    named = {"x-prefiller-host-port": f"127.0.0.1:{ports['prefill']}"}
    leg = {"kv_transfer_params": {"do_remote_decode": True}, "stream": False, "max_tokens": 1}

    async def by_hand(number: int) -> float:
        await prefill.ask(request(number, trace(), **leg))
        return await decode.ask(request(number, trace(), kv_transfer_params=PARAMS))

    return {
        "unified": {
            "direct": lambda number: decode.ask(request(number, trace())),
            "sidecar": lambda number: sidecar.ask(request(number, trace())),
        },
        "split": {
            "by hand": by_hand,
            "sidecar": lambda number: sidecar.ask(request(number, trace() | named)),
        },
    }


async def load(way: list[Way], seconds: float, times: Times) -> None:
    """Requests on each of the connections, one after the other, until the time is over."""
    deadline = time.perf_counter() + seconds

    async def one(serve: Way) -> None:
        number = 0
        while (sent := time.perf_counter()) < deadline:
            first = await serve(number)
            times.first.append(first - sent)
            times.whole.append(time.perf_counter() - sent)
            number += 1

    started = time.perf_counter()
    await asyncio.gather(*(one(serve) for serve in way))
    times.seconds += time.perf_counter() - started


async def measure(ports: dict[str, int], seconds: float, *, sampled: bool) -> dict[str, Any]:
    """For each number of connections and kind of request, the times of both ways, which took turns."""
    results: dict[str, Any] = {}
    for connections in CONNECTIONS:
        found = [await ways(ports, sampled=sampled) for _ in range(connections)]
        for kind in KINDS:
            both = {name: Times() for name in found[0][kind]}
            for name in both:
                await load([each[kind][name] for each in found], 0.5, Times())
            for _ in range(ROUNDS):
                for name, times in both.items():
                    await load([each[kind][name] for each in found], seconds / ROUNDS, times)
            results[f"{kind}, {connections} connections"] = {name: times.summary() for name, times in both.items()}
    return results


@contextmanager
def running(folder: Path) -> Iterator[dict[str, int]]:
    """Model servers, sidecar and sink; yields the ports."""
    ports = dict(zip(("prefill", "decode", "sidecar"), free_ports(3), strict=True))
    servers = [sys.executable, "-m", "bench.sidecar", "--serve", str(ports["prefill"]), str(ports["decode"])]
    command = [sys.executable, "-m", "llmtrace.sidecar", f"--port={ports['sidecar']}", "--secure-proxy=false"]
    command += [f"--model-server-port={ports['decode']}", "--kv-connector=nixlv2", "--tracing"]
    log = folder / "sidecar.log"
    with sink() as [receiver], process(servers, folder / "servers.log", {}):
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}"}
        with process(command, log, environment) as child:
            wait(f"http://127.0.0.1:{ports['sidecar']}/health", log, START_TIMEOUT_S, child)
            yield ports


async def serve(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(ModelServer, "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def report(results: dict[str, Any]) -> str:
    lines = []
    for title, both in results.items():
        (_, plain), (_, sidecar) = both.items()
        lines.append(title)
        for name, found in both.items():
            lines.append(
                f"  {name:8} TTFT p50 {found['ttft_p50_ms']:.2f} ms   p50 {found['p50_ms']:.2f} ms   "
                f"p99 {found['p99_ms']:.2f} ms   {found['requests_per_s']:,.0f} requests/s"
            )
        lines.append(
            f"  added    TTFT p50 {sidecar['ttft_p50_ms'] - plain['ttft_p50_ms']:.2f} ms   "
            f"p50 {sidecar['p50_ms'] - plain['p50_ms']:.2f} ms   p99 {sidecar['p99_ms'] - plain['p99_ms']:.2f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="load for each way, kind and number of connections")
    parser.add_argument("--unsampled", action="store_true", help="send a trace context that is not sampled")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, nargs="+", metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
        return
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as ports:
        results = uvloop.run(measure(ports, arguments.seconds, sampled=not arguments.unsampled))
    print(json.dumps(results, indent=2) if arguments.json else report(results))


if __name__ == "__main__":
    main()
