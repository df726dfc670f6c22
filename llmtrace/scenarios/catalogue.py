"""The scenarios that there are, by name."""

from __future__ import annotations

from typing import Any

from llmtrace.errors import UserError
from llmtrace.scenarios import autoscaling, pd_disaggregation, prefix_cache, wide_ep
from llmtrace.scenarios.scenario import Scenario

SCENARIOS: dict[str, Scenario[Any]] = {
    s.name: s for s in (prefix_cache.SCENARIO, pd_disaggregation.SCENARIO, wide_ep.SCENARIO, autoscaling.SCENARIO)
}


def scenario(name: str) -> Scenario[Any]:
    """The scenario of this name; UserError when there is none."""
    if name not in SCENARIOS:
        raise UserError(f"there is no scenario {name!r}; there is: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
