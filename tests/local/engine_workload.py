"""Requests of many kinds to one vLLM server, each in a trace of its own, and what became of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from engine_servers import MODEL, REQUEST_S, ModelServer, in_trace, new_trace_id

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHARED = tuple(f"{name}: " + f"what is known about {name} " * 12 for name in ("tides", "glass", "owls"))
"""Beginnings of prompts that the prefix cache can hold; about ten blocks each, a token a byte."""
STOPS = list("abcd")
LIKELY = {str(ord(char) - ord("!")): 4.0 for char in STOPS}
"""Biases of the logits that make the stop strings likely; the tiny model's token ids begin with the sign ``!``."""
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Planned:
    """A request to be sent."""

    kind: str
    path: str
    body: dict[str, Any]
    engine_requests: int = 1
    """What vLLM makes of it: prompts times n."""
    sampled: bool | None = True
    """None: it comes without a trace context."""
    hang_up_after: int | None = None
    """Chunks of the stream after which the client hangs up."""
    status: int = httpx.codes.OK
    trace_id: str = field(default_factory=new_trace_id)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.sampled is None else in_trace(self.trace_id, sampled=self.sampled)


@dataclass(frozen=True)
class Answered:
    """A request, when it was sent and answered (ns since the epoch), and the usage that its answer states, if any.

    ``first_ns`` is when the first byte of content came; of an answer in one piece, all of it.
    """

    planned: Planned
    usage: dict[str, Any] | None
    sent_ns: int
    first_ns: int
    answered_ns: int


def completion(kind: str, prompt: str | list[str], tokens: int, **more: Any) -> Planned:
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    planned = {name: more.pop(name) for name in ("sampled", "hang_up_after", "status") if name in more}
    return Planned(kind, COMPLETIONS, _streaming(body | more), prompts * more.get("n", 1), **planned)


def chat(kind: str, prompt: str, tokens: int, **more: Any) -> Planned:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    planned = {name: more.pop(name) for name in ("sampled", "hang_up_after", "status") if name in more}
    return Planned(kind, CHAT, _streaming(body | more), more.get("n", 1), **planned)


def _streaming(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"stream_options": {"include_usage": True}} if body.get("stream") else body


def mixed(count: int, seed: int) -> list[Planned]:
    """``count`` requests that all end by themselves, in an order that is the same for the same seed."""
    draw = random.Random(seed)

    def prompt(low: int, high: int) -> str:
        return f"{draw.random():.12f} " + "x" * draw.randint(low, high)

    def shared(number: int) -> str:
        return SHARED[number % len(SHARED)] + prompt(10, 60)

    kinds = (
        lambda i: completion("short", prompt(1, 20), draw.randint(1, 40)),
        lambda i: completion("long", prompt(400, 700), draw.randint(1, 60)),
        lambda i: completion("shared prefix", shared(i), draw.randint(2, 60)),
        lambda i: completion("stream", shared(i), draw.randint(2, 60), stream=True),
        lambda i: chat("chat", prompt(20, 200), draw.randint(2, 60)),
        lambda i: chat("chat stream", shared(i), draw.randint(2, 60), stream=True),
        lambda i: chat("chat n", prompt(20, 200), draw.randint(2, 40), n=draw.randint(2, 3), stream=bool(i % 2)),
        lambda i: completion("prompt list", [shared(i), prompt(5, 90), shared(i + 1)], draw.randint(2, 40)),
        lambda i: completion("prompt list and n", [prompt(5, 90), prompt(5, 90)], draw.randint(2, 20), n=2),
        lambda i: completion(
            "stop string", shared(i), 120, stop=STOPS, logit_bias=LIKELY, min_tokens=4, stream=bool(i % 2)
        ),
        lambda i: chat(
            "structured",
            prompt(20, 60),
            60,
            ignore_eos=False,
            response_format={"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}},
        ),
        lambda i: completion(
            "structured choice", prompt(5, 40), 40, ignore_eos=False, structured_outputs={"choice": ["yes", "no"]}
        ),
        lambda i: completion("one token", shared(i), 1),
    )
    planned = [kinds[number % len(kinds)](number) for number in range(count)]
    draw.shuffle(planned)
    return planned


def unsampled(count: int) -> list[Planned]:
    """Requests of which nothing shall be seen: with a trace context that is not sampled, or with none."""
    return [
        chat("unsampled", f"{number} nobody looks", 12, sampled=None if number % 2 else False, n=1 + number % 3)
        for number in range(count)
    ]


def refused(longest: int) -> list[Planned]:
    """Requests that the API server refuses; ``longest`` is the model's context length in tokens."""
    bad_schema = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}}
    return [
        completion("too long", "x" * (longest + 1), 1, status=400),
        completion("too many tokens", "x", longest + 1, status=400),
        completion("no such model", "x", 1, model="absent", status=404),
        chat("bad schema", "x", 4, response_format=bad_schema, status=400),
    ]


async def send(server: ModelServer, planned: Iterable[Planned], at_once: int) -> list[Answered]:
    """Send all of them, ``at_once`` at a time, and wait for the answers."""
    gate = asyncio.Semaphore(at_once)
    async with client(server) as connection:

        async def one(request: Planned) -> Answered:
            async with gate:
                sent_ns = time.time_ns()
                usage, first_ns = await answer(connection, request)
                return Answered(request, usage, sent_ns, first_ns, time.time_ns())

        return await asyncio.gather(*map(one, planned))


def client(server: ModelServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.client.base_url, timeout=REQUEST_S, trust_env=False, limits=httpx.Limits())


async def answer(connection: httpx.AsyncClient, request: Planned) -> tuple[dict[str, Any] | None, int]:
    """Send one, check the status of its answer, and return the usage that it states and when its content began."""
    if not request.body.get("stream"):
        response = await connection.post(request.path, json=request.body, headers=request.headers)
        assert response.status_code == request.status, (request.kind, response.text)
        return response.json().get("usage"), time.time_ns()
    usage: dict[str, Any] | None = None
    first_ns = 0
    async with connection.stream("POST", request.path, json=request.body, headers=request.headers) as response:
        assert response.status_code == request.status, (request.kind, await response.aread())
        chunks = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunks += 1
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage") or usage
            if not first_ns and any(map(_content, event["choices"])):
                first_ns = time.time_ns()
            if chunks == request.hang_up_after:
                return None, first_ns
    assert request.hang_up_after is None, f"{request.kind} ended before its client could hang up"
    return usage, first_ns or time.time_ns()


def _content(choice: dict[str, Any]) -> str | None:
    content: str | None = choice["text"] if "text" in choice else choice["delta"].get("content")
    return content
