"""Durations as Go writes them, such as 500ms or 2s: in configurations and on the command line."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


def seconds(text: object) -> float:
    """A positive duration in seconds; raises ValueError where the text is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)", text) if isinstance(text, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no duration such as 500ms or 2s")
    return float(match[1]) * _UNITS[match[2]]


Duration = Annotated[float, BeforeValidator(seconds)]
"""A parameter: seconds, written as a duration."""
