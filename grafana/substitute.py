"""Grafana's variables in a query, replaced as Grafana does it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")


def interval(step_s: int, scrape_s: int) -> int:
    """Grafana's ``$__rate_interval`` in seconds: at least four scrapes, so that a rate has two samples to go by."""
    return max(step_s + scrape_s, 4 * scrape_s)


def defaults(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """What the variables of a dashboard's JSON stand for when it is opened: "All" where that is their choice."""
    found: dict[str, str] = {}
    for variable in dashboard["templating"]["list"]:
        value = variable.get("current", {}).get("value", "")
        found[variable["name"]] = variable["allValue"] if value == "$__all" else str(value)
    return found


def built_in(step_s: int, scrape_s: int, range_s: int) -> dict[str, str]:
    """Grafana's own variables of a range of so many seconds, drawn at one point per step."""
    return {
        "__rate_interval": f"{interval(step_s, scrape_s)}s",
        "__interval": f"{step_s}s",
        "__range": f"{range_s}s",
    }


def selected(values: Sequence[str]) -> str:
    """Several values of one variable in a regular expression, as Prometheus' and Tempo's data sources write them."""
    escaped = [re.sub(r"([\\^$.*+?()[\]{}|])", r"\\\\\1", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def substitute(text: str, values: Mapping[str, str]) -> str:
    """The text with every variable replaced; KeyError names one that has no value."""
    return _VARIABLE.sub(lambda match: values[match[1] or match[2]], text)
