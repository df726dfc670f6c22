"""The load: streamed completions in a closed loop, as light as it can be, because it shares the servers' cores."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import uvloop

TIMEOUT_S = 300
"""For all requests of one round together."""
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_TAIL_BYTES = 1024
_NOT_TOKENS = 2
"""Events that close a stream: the usage, and [DONE]."""


@dataclass(frozen=True)
class Request:
    """A completion to ask for: token ids of the prompt, and exactly how many tokens to make."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Times:
    """What the client saw of one request. Seconds."""

    ttft: float
    latency: float
    tpot: float
    """Between tokens, mean."""
    gaps: tuple[float, ...]
    """Between arrivals of tokens; now and then two come at once."""
    tokens: int


@dataclass
class Load:
    """One round of one server."""

    seconds: float = 0.0
    times: list[Times] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.times)


def requests(seed: int, count: int, prompt_tokens: int, output_tokens: int, vocabulary: int) -> list[Request]:
    """Seeded requests whose lengths spread evenly from half to one and a half of the means given."""
    draw = random.Random(seed)

    def length(mean: int) -> int:
        return draw.randint(mean - mean // 2, mean + mean // 2)

    return [
        Request(tuple(draw.randrange(vocabulary) for _ in range(length(prompt_tokens))), length(output_tokens))
        for _ in range(count)
    ]


def encode(request: Request, *, salt: str, sampled: bool, ids: random.Random) -> bytes:
    """The request on the wire. ``salt`` keeps it from the prefix cache of every other; ``ids`` make its trace id."""
    body = {
        "model": "bench",
        "prompt": list(request.prompt),
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    encoded = json.dumps(body).encode()
    trace = f"00-{ids.getrandbits(128) | 1:032x}-{ids.getrandbits(64) | 1:016x}-{int(sampled):02x}"
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"traceparent: {trace}\r\ncontent-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def drive(port: int, messages: Sequence[bytes], concurrency: int) -> Load:
    """Send all ``messages`` over ``concurrency`` connections, on each the next when the last is answered.

    Raises ConnectionError where a server refuses a request or hangs up, TimeoutError after TIMEOUT_S.
    """
    return uvloop.run(_drive(port, messages, concurrency))


async def _drive(port: int, messages: Sequence[bytes], concurrency: int) -> Load:
    load = Load()
    work = iter(messages)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT_S):
        connections = [
            (await loop.create_connection(lambda: _Connection(work, load), "127.0.0.1", port))[1]
            for _ in range(concurrency)
        ]
        began = time.perf_counter()
        for connection in connections:
            connection.send()
        await asyncio.gather(*(connection.done for connection in connections))
        load.seconds = time.perf_counter() - began
    return load


class _Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, work: Iterator[bytes], load: Load) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work = work
        self._load = load
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self) -> None:
        message = next(self._work, None)
        if message is None:
            self._over = True
            self._transport.close()
            return
        self._stream = Stream(time.perf_counter())
        self._transport.write(message)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        try:
            times = self._stream.receive(data, time.perf_counter())
        except ConnectionError as error:
            self.done.set_exception(error)
            self._transport.close()
            return
        if times is not None:
            self._load.times.append(times)
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if self._over:
            self.done.set_result(None)
        else:
            self.done.set_exception(error or ConnectionError("the server hung up"))


class Stream:
    """One streamed answer, from its bytes: how many events came when."""

    def __init__(self, sent: float) -> None:
        self._sent = sent
        self._head = b""
        self._in_body = False
        self._tail = b""
        self._half = b""
        self._events = 0
        self._arrivals: list[tuple[float, int]] = []

    def receive(self, data: bytes, now: float) -> Times | None:
        """Take the next bytes in; the answer's times when it is complete."""
        if not self._in_body:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return None
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"the server refused a request: {self._head.decode(errors='replace')}")
            self._in_body = True
        count = (self._half + data).count(b"\n\n")
        self._half = b"\n" if data.endswith(b"\n") and not data.endswith(b"\n\n") else b""
        if count:
            self._events += count
            self._arrivals.append((now, self._events))
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            return self._times()
        return None

    def _times(self) -> Times:
        usage = _USAGE.search(self._tail)
        if usage is None:
            raise ConnectionError(f"a stream ended without usage: {self._tail.decode(errors='replace')}")
        tokens = int(usage[1])
        last_event = self._events - _NOT_TOKENS
        arrived = []
        for moment, events in self._arrivals:
            arrived.append(moment)
            if events >= last_event:
                break
        first, last = arrived[0], arrived[-1]
        gaps = tuple(later - earlier for earlier, later in pairwise(arrived))
        return Times(first - self._sent, last - self._sent, (last - first) / max(tokens - 1, 1), gaps, tokens)
