"""The token-producer against an HTTP server that answers as vLLM 0.32 does; the real one is asked in tests/local."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from picking import Handle, Memory, endpoint
from pydantic import ValidationError

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugins import token_producer
from llmtrace.picker.plugins.token_producer import TokenProducer, TokenProducerParameters
from llmtrace.picker.request import InferenceRequest, parse, token_bytes
from llmtrace.spans import Tracer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Renderer:
    """Answers with the code points of what it is asked as tokens; ``status`` and ``raw`` change that."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.status = 200
        self.raw: bytes | None = None
        self.release = threading.Event()
        self.release.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, body))
                outer.release.wait(20)
                content = outer.raw if outer.raw is not None else json.dumps(outer.answer(self.path, body)).encode()
                self.send_response(outer.status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def answer(path: str, body: dict[str, Any]) -> Any:
        def rendered(text: str) -> dict[str, Any]:
            return {"request_id": "r", "token_ids": [ord(char) for char in text], "features": None}

        if path == "/v1/chat/completions/render":
            return rendered("".join(str(message["content"]) for message in body["messages"]))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return [rendered(prompt) for prompt in prompts]

    @property
    def endpoint(self) -> Endpoint:
        made = endpoint(0)
        made.host, made.port, made.address = "127.0.0.1", str(self.port), f"127.0.0.1:{self.port}"
        return made

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    made = Renderer()
    yield made
    made.close()


class Asking:
    """A token-producer and what it did."""

    def __init__(self, renderer: Renderer, **parameters: Any) -> None:
        self.memory = Memory()
        self.tracer = Tracer(TracerProvider(), self.memory, "test")
        self.endpoints = [renderer.endpoint]
        made = TokenProducerParameters.model_validate({"modelName": "base", **parameters})
        self.plugin = TokenProducer("tokens", made, Handle(tracer=self.tracer))

    async def ask(self, path: str = CHAT, **body: Any) -> InferenceRequest:
        request = parse("r1", {":path": path}, json.dumps({"model": "smol", **body}).encode())
        span = self.tracer.start("orchestration", None, SpanKind.SERVER)
        request.span = span
        await self.plugin.tokenize(request, self.endpoints)
        span.end()
        return request

    @property
    def rendered(self) -> list[Any]:
        return [span for span in self.memory.spans() if span.name.startswith("tokenize_render")]


@pytest.fixture
async def asking(renderer: Renderer) -> AsyncIterator[Asking]:
    made = Asking(renderer)
    running = asyncio.create_task(made.plugin.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def ids(text: str) -> bytes:
    return token_bytes([ord(char) for char in text])


async def test_a_chat_is_rendered(asking: Asking, renderer: Renderer) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = await asking.ask(messages=messages("häuser"), tools=tools, stream=True, cache_salt="s", user="u")
    assert (request.tokenized, request.prompts) == (True, (ids("häuser"),))
    assert renderer.asked == [
        ("/v1/chat/completions/render", {"model": "base", "messages": messages("häuser"), "tools": tools})
    ]
    (span,) = asking.rendered
    assert (span.name, span.kind) == ("tokenize_render /v1/chat/completions/render", "CLIENT")
    assert span.attributes == {
        "http.request.method": "POST",
        "url.full": f"http://127.0.0.1:{renderer.port}/v1/chat/completions/render",
        "server.address": "127.0.0.1",
        "server.port": renderer.port,
        "http.response.status_code": 200,
    }
    assert span.status == "UNSET"


async def test_completions_are_rendered_prompt_by_prompt(asking: Asking, renderer: Renderer) -> None:
    assert (await asking.ask(COMPLETIONS, prompt="one")).prompts == (ids("one"),)
    request = await asking.ask(COMPLETIONS, prompt=["one", "two"])
    assert (request.tokenized, request.prompts) == (True, (ids("one"), ids("two")))
    assert [path for path, _ in renderer.asked] == ["/v1/completions/render"] * 2


@pytest.mark.parametrize("prompt", [[1, 2, 70000], [[1, 2], [3]]])
async def test_tokens_are_tokens_already(asking: Asking, renderer: Renderer, prompt: list[Any]) -> None:
    request = await asking.ask(COMPLETIONS, prompt=prompt)
    expected = prompt if isinstance(prompt[0], list) else [prompt]
    assert (request.tokenized, request.prompts) == (True, tuple(map(token_bytes, expected)))
    assert renderer.asked == []


async def test_what_was_asked_before_is_remembered(asking: Asking, renderer: Renderer) -> None:
    first = await asking.ask(messages=messages("same"), cache_salt="a", stream=True)
    again = await asking.ask(messages=messages("same"), cache_salt="b")
    assert first.prompts == again.prompts
    assert (len(renderer.asked), len(asking.rendered)) == (1, 1)
    await asking.ask(messages=messages("same"), chat_template_kwargs={"x": 1})
    assert len(renderer.asked) == 2


async def test_memory_is_bounded(asking: Asking, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_producer, "MAX_CACHE_BYTES", 100)
    for text in ("a" * 10, "b" * 10, "a" * 10, "c" * 10, "a" * 10, "b" * 10, "d" * 1000, "d" * 1000):
        assert (await asking.ask(messages=messages(text))).prompts == (ids(text),)
    asked = ["".join(m["content"][:1] for m in body["messages"]) for _, body in renderer.asked]
    assert asked == ["a", "b", "c", "b", "d", "d"], "the one that was used last stays; one that is too large does not"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": ["strange"]}]}),
        ("/v1/embeddings", {"input": "text"}),
        ("/v1/responses", {"input": "text"}),
        ("/v1/models", {}),
    ],
)
async def test_media_and_other_apis_are_left_alone(
    asking: Asking, renderer: Renderer, path: str, body: dict[str, Any]
) -> None:
    request = await asking.ask(path, **body)
    estimate = parse("r1", {":path": path}, json.dumps({"model": "smol", **body}).encode()).prompts
    assert (request.tokenized, request.prompts) == (False, estimate)
    assert renderer.asked == []


async def test_parts_of_text_are_rendered(asking: Asking, renderer: Renderer) -> None:
    request = await asking.ask(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}])
    assert request.tokenized
    assert len(renderer.asked) == 1


@pytest.mark.parametrize(
    ("status", "raw", "complaint"),
    [
        (403, b'{"error": "secret prompt"}', "answers 403 to /v1/chat/completions/render: start vLLM with --enable-sc"),
        (404, b"", "answers 404"),
        (500, b"", "answers 500"),
        (200, b"no JSON", "none of vLLM 0.32"),
        (200, b"[]", "none of vLLM 0.32"),
        (200, b'{"token_ids": [-1]}', "none of vLLM 0.32"),
        (200, b'{"token_ids": [1], "features": {"mm_hashes": {"image": ["x"]}}}', "has media"),
    ],
)
async def test_without_tokens_the_request_goes_on(
    asking: Asking,
    renderer: Renderer,
    caplog: pytest.LogCaptureFixture,
    status: int,
    raw: bytes,
    complaint: str,
) -> None:
    renderer.status, renderer.raw = status, raw
    for _ in range(3):
        request = await asking.ask(messages=messages("secret prompt"))
        assert not request.tokenized
    assert caplog.text.count(complaint) == 1, caplog.text
    assert "secret" not in caplog.text
    span = asking.rendered[-1]
    assert (span.status, span.attributes.get("error.type")) == (
        ("ERROR", str(status)) if status != 200 else ("UNSET", None)
    )
    renderer.status, renderer.raw = 200, None
    assert (await asking.ask(messages=messages("secret prompt"))).tokenized
    renderer.status = 500
    await asking.ask(messages=messages("other"))
    assert caplog.text.count("the tokens of prompts are not known") == 2, "it is said again after it worked"


async def test_a_wrong_request_is_no_fault_of_the_server(
    asking: Asking, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    renderer.status, renderer.raw = 400, b'{"error": {"message": "secret prompt is too long"}}'
    assert not (await asking.ask(messages=messages("x"))).tokenized
    assert caplog.text == ""
    (span,) = asking.rendered
    assert (span.status, span.attributes["http.response.status_code"]) == ("UNSET", 400)


async def test_a_server_that_hangs_or_refuses(renderer: Renderer, caplog: pytest.LogCaptureFixture) -> None:
    asking = Asking(renderer, vllm={"timeout": "50ms"})
    renderer.release.clear()
    assert not (await asking.ask(messages=messages("x"))).tokenized
    assert asking.rendered[0].attributes["error.type"] == "TimeoutError"
    renderer.close()
    assert not (await asking.ask(messages=messages("x"))).tokenized
    assert asking.rendered[1].attributes["error.type"] == "ConnectError"
    assert asking.rendered[1].status == "ERROR"
    assert caplog.text.count("does not answer (TimeoutError)") == 1


async def test_servers_are_asked_in_turn_or_the_one_of_the_configuration(renderer: Renderer) -> None:
    other = Renderer()
    try:
        asking = Asking(renderer)
        asking.endpoints = [renderer.endpoint, other.endpoint]
        for number in range(4):
            await asking.ask(messages=messages(str(number)))
        assert (len(renderer.asked), len(other.asked)) == (2, 2)
        fixed = Asking(renderer, vllm={"url": f"http://127.0.0.1:{other.port}/"})
        assert (await fixed.ask(messages=messages("x"))).tokenized
        assert (len(renderer.asked), len(other.asked)) == (2, 3)
    finally:
        other.close()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"modelName": ""},
        {"modelName": "m", "vllm": {"url": "https://host"}},
        {"modelName": "m", "vllm": {"url": "http://host/path"}},
        {"modelName": "m", "vllm": {"timeout": "5"}},
        {"modelName": "m", "vllm": {"timeout": "0s"}},
        {"modelName": "m", "vllm": {"timeout": 5}},
        {"modelName": "m", "estimate": {}},
    ],
)
def test_parameters_that_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenProducerParameters.model_validate(parameters)


def test_parameters() -> None:
    made = TokenProducerParameters.model_validate({"modelName": "m", "vllm": {"timeout": "1500ms"}})
    assert (made.model_name, made.vllm.url, made.vllm.timeout) == ("m", "", 1.5)
    assert TokenProducerParameters.model_validate({"modelName": "m"}).vllm.timeout == 5.0
