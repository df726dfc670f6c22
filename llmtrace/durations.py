"""Durations as Go writes them, such as 500ms, 2s or 1m30s: in configurations and on the command line."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)"


def seconds(text: object) -> float:
    """A duration in seconds, more than 0; raises ValueError where the text is none."""
    if isinstance(text, str) and re.fullmatch(f"(?:{_PART})+", text):
        total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text))
        if total > 0:
            return total
    raise ValueError(f"{text!r} is no duration such as 500ms or 2s")


Duration = Annotated[float, BeforeValidator(seconds)]
"""A parameter: seconds, written as a duration."""
