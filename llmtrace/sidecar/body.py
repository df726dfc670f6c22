"""The JSON of a split request: the bodies of its two legs, and the usage in its response.

Source: llm-d-router, pkg/sidecar/proxy/connector_nixlv2.go and cached_tokens_usage_rewriter.go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

KV_TRANSFER_PARAMS = "kv_transfer_params"
CACHED_TOKENS = "cached_tokens"
PROMPT_DETAILS = "prompt_tokens_details"
PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What tells the prefill server to keep the KV cache for a decode server."""

TOO_DEEP = "it is nested too deeply"
DATA = b"data: "
"""How a line of an event stream begins that holds JSON."""

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Api:
    """An API that can be split: its name in spans, and where its requests limit their tokens.

    ``limits`` are fields of the object ``inside``, or of the body itself.
    """

    name: str
    limits: tuple[str, ...]
    inside: str = ""


_CHAT = Api("chat_completions", ("max_tokens", "max_completion_tokens", "min_tokens"))
APIS = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/responses": Api("responses", ("max_output_tokens",)),
    "/inference/v1/generate": Api("generate", ("max_tokens", "min_tokens"), "sampling_params"),
}
"""Splittable APIs by path; the method is POST."""


def parse(raw: bytes) -> dict[str, Any]:
    """The object that ``raw`` holds; raises ValueError where it holds none."""
    try:
        found = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - a body is wrong in one way
    return found


def dump(value: object) -> bytes:
    """Compact JSON in UTF-8; raises ValueError for a number that JSON has not, such as one beyond a double's range."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def prefill_leg(body: Body, api: Api) -> bytes:
    """The request's body for the prefill server: one token, no stream, and the KV cache to be kept."""
    limits: dict[str, Any] = dict.fromkeys(api.limits, 1)
    if api.inside:
        given = body.get(api.inside)
        limits = {api.inside: {**(given if isinstance(given, dict) else {}), **limits}}
    leg = {**body, **limits, KV_TRANSFER_PARAMS: PREFILL_PARAMS, "stream": False}
    leg.pop("stream_options", None)
    return dump(leg)


def decode_leg(body: Body, answer: Body) -> bytes:
    """The request's body for the decode server: the client's, with what the prefill server said about the KV cache."""
    return dump({**body, KV_TRANSFER_PARAMS: answer.get(KV_TRANSFER_PARAMS)})


def cached_tokens(answer: Body) -> int:
    """Prompt tokens that the prefill server had cached; 0 where it does not say, as vLLM leaves out a 0."""
    usage = answer.get("usage")
    details = usage.get(PROMPT_DETAILS) if isinstance(usage, dict) else None
    found = details.get(CACHED_TOKENS) if isinstance(details, dict) else None
    return int(found) if isinstance(found, int | float) and not isinstance(found, bool) else 0


class UsageRewriter:
    """Puts the prefill server's cached tokens in the usage of the decode server's response.

    To the decode server all tokens that it pulled are cached; to the client only those are that nobody computed.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._rest = b""

    def whole(self, raw: bytes) -> bytes:
        """A complete JSON body; anything else comes back as it is."""
        if b'"usage"' not in raw:
            return raw
        try:
            content = parse(raw)
            usage = content.get("usage")
            if not isinstance(usage, dict):
                return raw
            details = usage.get(PROMPT_DETAILS)
            if not isinstance(details, dict):
                details = usage[PROMPT_DETAILS] = {}
            if details.get(CACHED_TOKENS) == self._tokens:
                return raw
            details[CACHED_TOKENS] = self._tokens
            return dump(content)
        except ValueError:
            return raw

    def stream(self, chunk: bytes) -> bytes:
        """The complete lines of an event stream up to now; the rest of a line waits for its end."""
        lines, newline, self._rest = (self._rest + chunk).rpartition(b"\n")
        if b'"usage"' not in lines:
            return lines + newline
        return b"\n".join(map(self._line, lines.split(b"\n"))) + newline

    def end(self) -> bytes:
        """The last line, where the stream ended without a newline."""
        rest, self._rest = self._rest, b""
        return self._line(rest)

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(DATA):
            return line
        text = line.removeprefix(DATA).rstrip(b"\r")
        return DATA + self.whole(text) + line[len(DATA) + len(text) :]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
