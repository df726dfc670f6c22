"""token-producer: the token ids of prompts, from the model servers themselves.

vLLM renders a request as it would to serve it: chat template, tools, special tokens. vLLM 0.32 does so with
``--enable-scale-out`` only. Source: llm-d-router, dataproducer/tokenizer; vLLM 0.32, entrypoints/scale_out/render.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import httpx
import msgspec
from opentelemetry.trace import SpanKind
from pydantic import Field

from llmtrace.durations import Duration
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Handle, Parameters, Tokenizer
from llmtrace.picker.request import InferenceRequest, token_bytes
from llmtrace.semconv import attributes as a

SCOPE = "go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
CHAT, COMPLETIONS = "/v1/chat/completions/render", "/v1/completions/render"
NOT_RENDERED = frozenset(("stream", "stream_options", "cache_salt", "user"))
"""Fields of a request that have no part in its tokens."""
MAX_CACHE_BYTES = 32 << 20

Prompts = tuple[bytes, ...]

_log = logging.getLogger(__name__)


class VLLMParameters(Parameters):
    """``url`` of the server that renders; empty: the pool's ready endpoints in turn. ``timeout`` in seconds."""

    url: str = Field(default="", pattern="^$|^http://[^/]+/?$")
    timeout: Duration = 5.0


class TokenProducerParameters(Parameters):
    """llm-d's parameters of the backend ``vllm``. ``model_name`` is the name under which vLLM serves the base model."""

    model_name: str = Field(min_length=1)
    vllm: VLLMParameters = VLLMParameters()


class _Rendered(msgspec.Struct):
    token_ids: list[int]
    features: Any = None


class RenderError(Exception):
    """The prompts were not rendered. Says why, and nothing of the prompts."""


@REGISTRY.register
class TokenProducer(Tokenizer[TokenProducerParameters]):
    """Asks vLLM, and remembers what it said about the same prompts. Prompts with media are left as they are."""

    type: ClassVar[str] = "token-producer"
    parameters_type = TokenProducerParameters

    def __init__(self, name: str, parameters: TokenProducerParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        self._client = httpx.AsyncClient(trust_env=False)
        self._tracer = handle.tracer.scoped(SCOPE)
        self._turn = count()
        self._cache: OrderedDict[bytes, Prompts] = OrderedDict()
        self._cache_bytes = 0
        self._failing = ""

    async def run(self) -> None:
        """Close the connections in the end."""
        async with self._client:
            await asyncio.Event().wait()

    async def tokenize(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put the token ids into the request, in time."""
        body = request.body or {}
        path = _path(request)
        if path is None:
            return
        if path == COMPLETIONS and _are_tokens(body.get("prompt")):
            request.tokenized = True
            return
        rendered = {key: value for key, value in body.items() if key not in NOT_RENDERED}
        content = json.dumps({**rendered, "model": self.parameters.model_name}).encode()
        key = hashlib.sha256(path.encode() + content).digest()
        prompts = self._remembered(key)
        if prompts is None:
            try:
                prompts = await self._render(request, self._base(endpoints), path, content)
            except RenderError as error:
                self._complain(str(error))
                return
            self._failing = ""
            if prompts is None:
                return
            self._remember(key, prompts)
        request.prompts = prompts
        request.tokenized = True

    def _base(self, endpoints: Sequence[Endpoint]) -> str:
        return self.parameters.vllm.url.rstrip("/") or f"http://{endpoints[next(self._turn) % len(endpoints)].address}"

    async def _render(self, request: InferenceRequest, base: str, path: str, content: bytes) -> Prompts | None:
        """The prompts' tokens; None where the request itself is wrong, which the model server will tell the client."""
        url = httpx.URL(base + path)
        with request.span.child(a.RENDER_SPAN_PREFIX + path, SpanKind.CLIENT, self._tracer) as span:
            span.attributes = {
                a.HTTP_METHOD: "POST",
                a.URL_FULL: str(url),
                a.SERVER_ADDRESS: url.host,
                a.SERVER_PORT: url.port or 80,
            }
            try:
                async with asyncio.timeout(self.parameters.vllm.timeout):
                    response = await self._client.post(
                        url, content=content, headers={"content-type": "application/json"}, timeout=None
                    )
            except (httpx.HTTPError, TimeoutError) as error:
                span.attributes[a.ERROR_TYPE] = type(error).__name__
                span.fail(type(error).__name__, "the prompt was not rendered")
                raise RenderError(f"{base} does not answer ({type(error).__name__})") from None
            span.attributes[a.HTTP_STATUS] = response.status_code
            if response.status_code == httpx.codes.BAD_REQUEST:
                return None
            if response.status_code != httpx.codes.OK:
                span.attributes[a.ERROR_TYPE] = str(response.status_code)
                span.fail(str(response.status_code), "the prompt was not rendered")
                hint = ": start vLLM with --enable-scale-out" if response.status_code == httpx.codes.FORBIDDEN else ""
                raise RenderError(f"{base} answers {response.status_code} to {path}{hint}")
        return _prompts(response.content, path)

    def _remembered(self, key: bytes) -> Prompts | None:
        prompts = self._cache.get(key)
        if prompts is not None:
            self._cache.move_to_end(key)
        return prompts

    def _remember(self, key: bytes, prompts: Prompts) -> None:
        if key not in self._cache:
            self._cache[key] = prompts
            self._cache_bytes += sum(map(len, prompts))
        while self._cache_bytes > MAX_CACHE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._cache_bytes -= sum(map(len, oldest))

    def _complain(self, reason: str) -> None:
        """Say it, once until it works again."""
        if not self._failing:
            _log.warning("plugin %s: the tokens of prompts are not known: %s", self.name, reason)
        self._failing = reason


def _are_tokens(prompt: object) -> bool:
    """Whether a completion's prompt is a list of token ids, or several such."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int | list)


def _path(request: InferenceRequest) -> str | None:
    """Where the request is rendered; None where it cannot be, or has media, which would be fetched."""
    body, path = request.body, request.headers.get(":path", "").partition("?")[0]
    if body is None:
        return None
    if not path.endswith("/chat/completions"):
        return COMPLETIONS if path.endswith("/completions") else None
    for message in body["messages"]:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                return None
    return CHAT


def _prompts(content: bytes, path: str) -> Prompts:
    kind: Any = _Rendered if path == CHAT else list[_Rendered]
    try:
        found = msgspec.json.decode(content, type=kind)
        rendered: list[_Rendered] = [found] if path == CHAT else found
        if any(prompt.features for prompt in rendered):
            raise RenderError("the prompt has media")
        return tuple(token_bytes(prompt.token_ids) for prompt in rendered)
    except (msgspec.MsgspecError, struct.error) as error:
        raise RenderError(f"the answer to {path} is none of vLLM 0.32 ({type(error).__name__})") from None
