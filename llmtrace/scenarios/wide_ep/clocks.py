"""How far the nodes' clocks are apart, from the spans of the same step.

All ranks leave the last collective of a step together, and what is left of the step then is the same small work: so the
ends of a step's spans on two nodes differ by their clocks, and by little else in the median over many steps.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.wide_ep.steps import Steps

TOLERANCE_MS = 1.0
"""Below this nothing is said: clocks kept by NTP are not closer, and the work after the last collective may differ."""


class Skew(BaseModel):
    """``node``'s clock is ``skew_ms`` ahead of ``reference``'s (negative: behind).

    ``spread_ms`` is the median deviation over ``steps``; ``told`` says that the skew is more than the tolerance and
    three times the spread.
    """

    model_config = ConfigDict(frozen=True)
    node: str
    reference: str
    skew_ms: float
    spread_ms: float
    steps: int
    told: bool


def skews(steps: Steps, tolerance_ms: float = TOLERANCE_MS) -> list[Skew]:
    """The skew of every node against the first one; steps in which either has no rank do not count."""
    origin = int(steps.end_ns.min())
    ends = (steps.end_ns - origin) / 1e6
    of_step = np.repeat(np.arange(steps.count), steps.sizes)
    width = len(steps.nodes)
    cell = of_step * width + steps.node
    counts = np.bincount(cell, minlength=steps.count * width).reshape(-1, width)
    sums = np.bincount(cell, weights=ends, minlength=steps.count * width).reshape(-1, width)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    found = []
    for node in range(1, width):
        apart = means[:, node] - means[:, 0]
        apart = apart[~np.isnan(apart)]
        if not len(apart):
            continue
        skew = float(np.median(apart))
        spread = float(np.median(np.abs(apart - skew)))
        found.append(
            Skew(
                node=steps.nodes[node],
                reference=steps.nodes[0],
                skew_ms=skew,
                spread_ms=spread,
                steps=len(apart),
                told=abs(skew) > max(tolerance_ms, 3 * spread),
            )
        )
    return found
