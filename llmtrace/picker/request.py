"""An inference request as scheduling sees it, and the errors that answer it in place of a model server.

Source: llm-d-router's parsers, its estimating tokenizer, and its error package.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtrace.semconv import attributes as a
from llmtrace.spans import NO_SPAN, Span

BYTES_PER_TOKEN = 4
"""Where no tokenizer is at hand, llm-d takes four bytes of text for a token."""

_MODALITIES = {"image_url": "image", "video_url": "video", "input_audio": "audio", "audio_url": "audio"}

Body = dict[str, Any]


class RequestError(Exception):
    """The request is answered by the gateway: ``status`` is the HTTP status, ``code`` llm-d's name of the error."""

    def __init__(self, status: int, code: str, message: str, dropped_reason: str = "") -> None:
        super().__init__(f"inference error: {code} - {message}")
        self.status = status
        self.code = code
        self.dropped_reason = dropped_reason


def bad_request(message: str) -> RequestError:
    """The request is malformed: 400."""
    return RequestError(400, "BadRequest", message)


def too_large(limit: int) -> RequestError:
    """The body is larger than the picker buffers: 413."""
    return RequestError(413, "RequestTooLarge", f"the request body is larger than {limit} bytes")


def no_endpoints() -> RequestError:
    """No endpoint is ready: 503 with the dropped-reason header."""
    message = "failed to find endpoint candidates for serving the request"
    return RequestError(503, "ServiceUnavailable", message, a.DROPPED_NO_ENDPOINTS)


def no_result(message: str) -> RequestError:
    """Scheduling found no endpoint among the candidates: 429."""
    return RequestError(429, "ResourceExhausted", f"failed to find target endpoint: {message}")


@dataclass(slots=True)
class InferenceRequest:
    """A parsed request.

    ``prompts`` holds the input of each prompt as bytes, four bytes a (pseudo-)token, zero-padded; ``tokenized`` says
    that these are the token ids that the model will see. ``modalities`` has the kind of each image, video or sound in
    them, in their order. ``data`` is what plugins found out about the request, by plugin name. ``model`` is empty where
    the path is none of the known APIs. ``body`` is kept until the request is scheduled, and ``span`` is the one under
    which that is traced.
    """

    id: str
    model: str = ""
    prompts: tuple[bytes, ...] = ()
    modalities: tuple[str, ...] = ()
    cache_salt: str = ""
    stream: bool = False
    size_bytes: int = 0
    fairness_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tokenized: bool = False
    body: Body | None = field(default=None, repr=False)
    span: Span = field(default=NO_SPAN, repr=False)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together: an estimate, unless ``tokenized``."""
        return sum(map(len, self.prompts)) // BYTES_PER_TOKEN


def parse(request_id: str, headers: Mapping[str, str], raw: bytes) -> InferenceRequest:
    """Read a request; raises RequestError (400) with llm-d's words where it is malformed.

    A path that is none of OpenAI's inference APIs passes without interpretation.
    """
    request = InferenceRequest(id=request_id, headers=headers, size_bytes=len(raw))
    request.fairness_id = headers.get(a.FAIRNESS_HEADER, "")
    path = headers.get(":path", "").partition("?")[0]
    prompts_of = next((reader for pattern, reader in _READERS if pattern.search(path)), None)
    if prompts_of is None:
        return request
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"error unmarshaling request bodyMap: {error}") from None
    if not isinstance(body, dict):
        raise bad_request("error unmarshaling request bodyMap: the body is no JSON object")
    try:
        request.prompts = tuple(prompts_of(body))
        request.modalities = tuple(_modalities(body)) if prompts_of is _chat else ()
    except RecursionError:
        raise bad_request("error unmarshaling request bodyMap: the body is nested too deeply") from None
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("model not found in request body")
    request.model = _readable(model, "model")
    salt = body.get("cache_salt")
    request.cache_salt = _readable(salt, "cache_salt") if isinstance(salt, str) else ""
    request.stream = body.get("stream") is True
    request.body = body
    return request


def _readable(value: str, field: str) -> str:
    """JSON may hold half of a surrogate pair, which no metric, span or hash can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_request(f"{field} is no valid Unicode") from None
    return value


def _text(value: str) -> bytes:
    return _aligned(value.encode(errors="surrogatepass"))


def _aligned(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % BYTES_PER_TOKEN)


def token_bytes(ids: Sequence[int]) -> bytes:
    """Token ids, each of 32 bits at most, as :class:`InferenceRequest` holds them."""
    return struct.pack(f"<{len(ids)}I", *ids)


def _tokens(ids: list[int]) -> bytes:
    return token_bytes([token & 0xFFFFFFFF for token in ids])


def _chat(body: Body) -> list[bytes]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("invalid chat completions request: must have valid messages field")
    parts = [json.dumps(tools, separators=(",", ":"))] if (tools := body.get("tools")) else []
    for message in messages:
        if not isinstance(message, dict):
            raise bad_request("invalid chat completions request: must have valid messages field")
        role, content = message.get("role"), message.get("content")
        parts.append(role if isinstance(role, str) else "")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):
            parts.extend(_block(block) for block in content)
    return [_text("".join(parts))]


def _block(block: Any) -> str:
    """Text of a content block; other kinds count by their serialised form, so that equal ones match."""
    if isinstance(block, dict) and isinstance(text := block.get("text"), str):
        return text
    return json.dumps(block, separators=(",", ":"))


def _modalities(body: Body) -> Iterator[str]:
    for message in body["messages"]:
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and isinstance(kind := block.get("type"), str) and kind in _MODALITIES:
                yield _MODALITIES[kind]


def _inputs(value: Any, error: str) -> list[bytes]:
    """A string, a list of strings, a list of token ids or a list of such lists."""
    if isinstance(value, str):
        return [_text(value)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [_text(item) for item in value]
        if _is_tokens(value):
            return [_tokens(value)]
        if all(isinstance(item, list) and _is_tokens(item) for item in value):
            return [_tokens(item) for item in value]
    raise bad_request(error)


def _is_tokens(value: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _completion(body: Body) -> list[bytes]:
    return _inputs(body.get("prompt"), "invalid completions request: must have prompt field")


def _embedding(body: Body) -> list[bytes]:
    return _inputs(body.get("input"), "invalid embeddings request: must have input field")


def _responses(body: Body) -> list[bytes]:
    if "input" not in body:
        raise bad_request("invalid responses request: must have input field")
    parts = [{key: body[key]} for key in ("instructions", "tools", "input") if body.get(key) is not None]
    return [_text(json.dumps(parts, separators=(",", ":")))]


_READERS = (
    (re.compile(r"/chat/completions(/render)?$"), _chat),
    (re.compile(r"/completions(/render)?$"), _completion),
    (re.compile(r"/embeddings$"), _embedding),
    (re.compile(r"/responses$"), _responses),
)
