"""A sidecar on a free port, between a client and model servers that do what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from loopback import WAIT_S, free_port
from memory import Memory
from opentelemetry.sdk.trace import TracerProvider

from llmtrace.sidecar.config import Config
from llmtrace.sidecar.server import SidecarServer
from llmtrace.sidecar.tls import write_self_signed
from llmtrace.telemetry import Tracing
from llmtrace.traces.model import Span

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CHAT = "/v1/chat/completions"
PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [1, 2, 3],
    "remote_engine_id": "5b5fb28f-3f30-4bdd-9a36-958d52459200",
    "remote_host": "ahost",
    "remote_port": 4032,
}


@dataclass
class Seen:
    """A request as a model server got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def get(self, name: str) -> str | None:
        """The one value of a header."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) < 2, f"{name} is there {len(values)} times"
        return values[0] if values else None


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


def says(
    content: object = b"", status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None
) -> Answer:
    """An answer with a length; content that is not bytes is sent as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def answer(_: Seen, writer: asyncio.StreamWriter) -> None:
        lines = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)

    return answer


def chunked(*parts: bytes, kind: str = "text/event-stream") -> bytes:
    """Head and parts of a chunked response, without its end."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def prefilled(cached: int | None = 7, params: dict[str, Any] | None = PARAMS) -> Answer:
    """What vLLM answers a prefill leg."""
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": 64, "completion_tokens": 1, "total_tokens": 65, "prompt_tokens_details": details}
    return says({"id": "p", "choices": [], "usage": usage} | ({"kv_transfer_params": params} if params else {}))


DECODED = {
    "id": "d",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Ja, schön 🐘"}}],
    "usage": {"prompt_tokens": 64, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 49}},
}


class Server:
    """A model server: each request takes the next answer, the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[Seen] = []
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()
        """Set when the other end closed a connection while its answer was not complete."""
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0, **options: Any) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, **options)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._one(reader, writer)
                await writer.drain()
        writer.close()
        self._connections.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in head[1:-2])]
        seen = Seen(method, target, headers, b"")
        seen.body = await reader.readexactly(int(seen.get("content-length") or 0))
        self.requests.append(seen)
        self.arrived.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        working = asyncio.ensure_future(answer(seen, writer))
        gone = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            gone.cancel()
            await asyncio.wait({gone})
            await working
        else:
            self.left.set()
            working.cancel()
            raise ConnectionResetError

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()


@asynccontextmanager
async def serving(*answers: Answer, **options: Any) -> AsyncIterator[Server]:
    server = Server(*answers)
    await server.start(**options)
    try:
        yield server
    finally:
        await server.stop()


@dataclass
class Sidecar:
    """A running sidecar; ``client`` speaks to it."""

    port: int
    memory: Memory
    client: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)

    async def post(
        self, content: object, path: str = CHAT, prefill: str | None = None, **headers: str
    ) -> httpx.Response:
        """An inference request; content that is not bytes is sent as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        given = {"content-type": "application/json", "traceparent": TRACEPARENT}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if prefill is not None:
            given["x-prefiller-host-port"] = prefill
        return await self.client.post(path, content=body, headers=given)

    async def spans(self, number: int) -> list[Span]:
        """All spans, once there are ``number``: a request's are ready a moment after its response."""
        await self._until(lambda: len(self.memory.ended) >= number)
        found = self.memory.spans()
        assert len(found) == number, [span.name for span in found]
        return found

    async def spans_up_to(self, name: str) -> list[Span]:
        """All spans, once there is one of this name."""
        await self._until(lambda: any(span.name == name for span in self.memory.ended))
        assert any(span.name == name for span in self.memory.ended), [span.name for span in self.memory.ended]
        return self.memory.spans()

    async def _until(self, condition: Callable[[], bool]) -> None:
        for _ in range(int(WAIT_S / 0.01)):
            if condition():
                break
            await asyncio.sleep(0.01)


@asynccontextmanager
async def sidecar(
    decode: Server | int, *, scheme: str = "http", verify: Any = True, **config: Any
) -> AsyncIterator[Sidecar]:
    """A sidecar in front of a decode server; ``config`` as in Config, TLS off unless it says otherwise."""
    model_server_port = decode if isinstance(decode, int) else decode.port
    settings = Config(**{"port": free_port(), "model_server_port": model_server_port, "secure_proxy": False} | config)
    memory = Memory()
    stop = asyncio.Event()
    server = SidecarServer(settings, Tracing(TracerProvider(), memory))
    task = asyncio.create_task(server.run(stop))
    async with httpx.AsyncClient(
        base_url=f"{scheme}://127.0.0.1:{settings.port}", trust_env=False, timeout=WAIT_S, verify=verify
    ) as client:
        try:
            await _listening(settings.port, task)
            yield Sidecar(settings.port, memory, client)
        finally:
            await client.aclose()
            stop.set()
            await asyncio.wait_for(task, WAIT_S)


async def _listening(port: int, task: asyncio.Task[None]) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        if task.done():
            task.result()
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the sidecar did not listen within {WAIT_S} s")


def certificates(folder: Path) -> Path:
    """A folder with tls.crt and tls.key of localhost."""
    folder.mkdir(exist_ok=True)
    write_self_signed(folder)
    return folder
