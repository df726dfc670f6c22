"""Spans that are kept instead of sent."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace import SpanProcessor

from llmtrace.spans import otlp_request
from llmtrace.traces import otlp
from llmtrace.traces.model import Span


class Memory(SpanProcessor):
    """Keeps ended spans."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def on_end(self, span: Any) -> None:
        self.ended.append(span)

    def spans(self) -> list[Span]:
        """The spans as a backend sees them."""
        return list(otlp.spans(otlp_request(self.ended).resource_spans))
