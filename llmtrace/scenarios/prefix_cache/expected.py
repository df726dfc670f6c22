"""The prefix-cache scenario's name, its two arms, and the trace that each of its requests must produce."""

from __future__ import annotations

from llmtrace.scenarios.required import expectation
from llmtrace.semconv.definitions import registry

NAME = "prefix-cache"
CANDIDATE = "prefix-aware"
BASELINE = "random"
ARMS = (CANDIDATE, BASELINE)

EXPECTATION = expectation(registry(), NAME)
