"""What a step is called: all of it follows from the group, the step's number and the rank.

The group is chosen once per start of the ranks that step together. With data parallelism its name is agreed on through
the store that vLLM's engine cores already share.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from typing import Any

EVERY_VARIABLE = "LLMTRACE_STEP_EVERY"
"""Steps of which one is traced; 0 switches the feature off. The same on all ranks."""
EVERY_DEFAULT = 64
EXPERTS_VARIABLE = "LLMTRACE_EXPERTS_EVERY"
"""Traced steps of which one tells the tokens of the experts since the last one that did; 0 for none."""
EXPERTS_DEFAULT = 8
_STORE_KEY = "llmtrace/step-group"


def every(environment: Mapping[str, str] = os.environ) -> int:
    """Steps of which one is traced; 0 where none is, or where the variable is no number."""
    return number_of(environment, EVERY_VARIABLE, EVERY_DEFAULT)


def experts_every(environment: Mapping[str, str] = os.environ) -> int:
    """Steps of which one tells the tokens of the experts; 0 where none does, or where the variable is no number."""
    return every(environment) * number_of(environment, EXPERTS_VARIABLE, EXPERTS_DEFAULT)


def number_of(environment: Mapping[str, str], variable: str, default: int) -> int:
    """What a variable says; 0 where it is no number."""
    text = environment.get(variable, "").strip()
    if not text:
        return default
    return int(text) if text.isascii() and text.isdigit() else 0


def are_traced(config: Any, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether steps of an engine with this vLLM configuration are traced: a MoE model, and a place for traces."""
    observability = getattr(config, "observability_config", None)
    model = getattr(config, "model_config", None)
    wanted = getattr(observability, "otlp_traces_endpoint", None) is not None and bool(getattr(model, "is_moe", False))
    return wanted and every(environment) > 0


def new_name() -> str:
    """For a group."""
    return secrets.token_hex(8)


def agree(store: Any) -> str:
    """The group's name; ``store`` is torch's, which engine cores share.

    Waits for no other rank: the first to ask names the group.
    """
    agreed = store.compare_set(_STORE_KEY, "", new_name())
    return agreed.decode() if isinstance(agreed, bytes) else str(agreed)


def trace_id(group: str, number: int) -> int:
    """Of the step's trace; never 0."""
    return _digest(f"{group}/{number}", 16)


def span_id(group: str, number: int, rank: int) -> int:
    """Of a rank's span in it; never 0."""
    return _digest(f"{group}/{number}/{rank}", 8)


def _digest(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest()) or 1
