"""What a model server's response tells about a request: tokens, cached tokens, finish reasons."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

MAX_EVENT_BYTES = 1 << 20
"""A longer event or body is passed on unread."""
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_INTERESTING = re.compile(rb'"usage":\s*\{|"finish_reason":\s*"')


@dataclass(slots=True)
class Usage:
    """Token counts as the model server reports them; None where it does not."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)

    def read(self, payload: bytes) -> None:
        """Take what a JSON body or event says; anything else is passed over."""
        try:
            body = json.loads(payload)
        except (ValueError, RecursionError):
            return
        if not isinstance(body, dict):
            return
        usage = body.get("usage")
        if isinstance(usage, dict):
            self.input_tokens = _count(usage, "prompt_tokens", "input_tokens")
            self.output_tokens = _count(usage, "completion_tokens", "output_tokens")
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _count(details, "cached_tokens")
        choices = body.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            reason = choice.get("finish_reason") if isinstance(choice, dict) else None
            if isinstance(reason, str):
                self.finish_reasons.append(reason)


def _count(values: dict[str, Any], *names: str) -> int | None:
    found = next((values[name] for name in names if name in values), None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


class ResponseReader:
    """Follows a response body as it passes, streamed (server-sent events) or not."""

    def __init__(self, *, streaming: bool) -> None:
        self.usage = Usage()
        self._streaming = streaming
        self._pending = bytearray()
        self._overflow = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        if self._overflow:
            return
        self._pending += chunk
        if self._streaming:
            *events, rest = _EVENT_END.split(bytes(self._pending))
            self._pending = bytearray(rest)
            for event in events:
                self._event(event)
        if len(self._pending) > MAX_EVENT_BYTES:
            self._overflow = True
            self._pending.clear()

    def end(self) -> Usage:
        """The body is complete."""
        if self._pending and not self._overflow:
            if self._streaming:
                self._event(bytes(self._pending))
            else:
                self.usage.read(bytes(self._pending))
        self._pending.clear()
        return self.usage

    def _event(self, event: bytes) -> None:
        # Most events are a token's text; only those that tell more are parsed.
        if not _INTERESTING.search(event):
            return
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        self.usage.read(b"\n".join(lines))
