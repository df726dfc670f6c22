"""Who waited for whom, and what an even distribution of the experts' work would have saved.

A collective ends on all ranks at about the same time. So the rank that came to it last is in it shortest, and what
another rank is in it longer, that rank waited: no clock of two nodes is compared. As spans have sums over the layers,
a step in which the last rank changes from layer to layer shows less waiting than there was, never more.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.wide_ep.steps import COLLECTIVES, EXPERTS, PHASES, Floats, Integers, Steps

OWN_PHASES = tuple(i for i in range(len(PHASES)) if i not in COLLECTIVES)


class Straggler(BaseModel):
    """A rank that others waited for. Times in milliseconds.

    ``steps`` are those in which it was last. ``delay_ms`` is how long the others waited in such a step, in the mean
    over them and the median over steps; ``total_ms`` is the sum of the mean over all steps. ``phase`` is where it was
    longer than the others, ``other`` where in none of the layers' phases.
    """

    model_config = ConfigDict(frozen=True)
    rank: int
    node: str
    steps: int
    share: float
    delay_ms: float
    total_ms: float
    phase: str


def waited(steps: Steps) -> Floats:
    """How long each row's rank waited in collectives for the last one of its step, milliseconds."""
    inside: Floats = steps.phases[:, COLLECTIVES].sum(axis=1)
    least = np.minimum.reduceat(inside, steps.starts)
    return inside - steps.spread(least)


def last_rows(waits: Floats, steps: Steps) -> Integers:
    """The row of each step's last rank: the one that waited for nobody."""
    rows = np.flatnonzero(waits == 0.0)
    first = np.searchsorted(rows, steps.starts)
    found: Integers = rows[first].astype(np.int64)
    return found


def stragglers(steps: Steps) -> list[Straggler]:
    """The ranks that were last in a step, those that cost most first."""
    sizes = steps.sizes
    if int(sizes.max()) < 2:
        return []
    waits = waited(steps)
    last = last_rows(waits, steps)
    delay = np.add.reduceat(waits, steps.starts) / np.maximum(sizes - 1, 1)
    longer = _longer(steps, last)
    found = []
    for rank in np.unique(steps.rank[last]):
        mine = steps.rank[last] == rank
        found.append(
            Straggler(
                rank=int(rank),
                node=steps.nodes[int(steps.node[last[mine][0]])],
                steps=int(mine.sum()),
                share=float(mine.mean()),
                delay_ms=float(np.median(delay[mine])),
                total_ms=float(delay[mine].sum()),
                phase=(*(PHASES[i] for i in OWN_PHASES), "other")[int(longer[mine].sum(axis=0).argmax())],
            )
        )
    return sorted(found, key=lambda s: -s.total_ms)


def _longer(steps: Steps, last: Integers) -> Floats:
    """By how much the last rank was longer than the mean of the others, for each step and phase of its own."""
    own = np.column_stack([steps.phases[:, OWN_PHASES], steps.other])
    sums = np.add.reduceat(own, steps.starts, axis=0)
    others = np.maximum(steps.sizes - 1, 1)[:, None]
    difference: Floats = own[last] - (sums - own[last]) / others
    return difference


def imbalance(steps: Steps) -> Floats:
    """What each step would have been shorter, had every rank computed its experts as long as the mean; milliseconds."""
    experts = steps.phases[:, EXPERTS]
    slowest = np.maximum.reduceat(experts, steps.starts)
    lost: Floats = slowest - np.add.reduceat(experts, steps.starts) / steps.sizes
    return lost


def balance_saving_ms(steps: Steps) -> float:
    """The same, of all steps together."""
    return float(imbalance(steps).sum())
