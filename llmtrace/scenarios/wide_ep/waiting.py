"""Who waited for whom, and what an even distribution of the experts' work would have saved.

A collective ends on all ranks at about the same time. So the rank that came to it last is in it shortest, and what
another rank is in it longer, that rank waited: no clock of two nodes is compared. As spans have sums over the layers,
a step in which the last rank changes from layer to layer shows less waiting than there was, never more.

Of a step without phases nothing is known from within. But it as a whole ends like a collective: a rank whose part of it
is shorter began later, and the others waited for that.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.wide_ep.steps import COLLECTIVES, EXPERTS, PHASES, Floats, Integers, Steps

OWN_PHASES = tuple(i for i in range(len(PHASES)) if i not in COLLECTIVES)
START = "start"
"""Where a rank is late that began late."""
LATE_MS = 1.0
"""Beginning later by less is no lateness: after the last collective ranks do more or less, as their batches are."""


class Straggler(BaseModel):
    """A rank that others waited for, with its pod if it is in one. Times in milliseconds.

    ``steps`` are those in which it was last, and ``share`` how many that is of those that say their phases.
    ``delay_ms`` is how long the others waited in such a step, in the mean over them and the median over steps;
    ``total_ms`` is the sum of the mean over all steps. ``phase`` is where it was longer than the others, ``other``
    where in none of the layers' phases. With ``start`` it is about the steps that do not say their phases, of which
    ``share`` is then a share: it began them late.
    """

    model_config = ConfigDict(frozen=True)
    rank: int
    node: str
    pod: str
    steps: int
    share: float
    delay_ms: float
    total_ms: float
    phase: str


def waited(steps: Steps) -> Floats:
    """How long each row's rank waited for the last one of its step, milliseconds."""
    together = _together(steps)
    waits: Floats = together - steps.spread(np.minimum.reduceat(together, steps.starts))
    waits[~steps.spread(steps.phased) & (waits < LATE_MS)] = 0.0
    return waits


def _together(steps: Steps) -> Floats:
    """How long each row's rank was in what all ranks leave together: collectives, or a step of unknown phases."""
    inside = sum(steps.phases[:, i] for i in COLLECTIVES)
    found: Floats = np.where(steps.spread(steps.phased), inside, steps.duration)
    return found


def _last_rows(steps: Steps) -> Integers:
    """The row of each step's last rank: the one that waited for nobody."""
    together = _together(steps)
    rows = np.flatnonzero(together == steps.spread(np.minimum.reduceat(together, steps.starts)))
    found: Integers = rows[np.searchsorted(rows, steps.starts)].astype(np.int64)
    return found


def stragglers(steps: Steps) -> list[Straggler]:
    """The ranks that were last in a step, those that cost most first."""
    sizes = steps.sizes
    if int(sizes.max()) < 2:
        return []
    last = _last_rows(steps)
    delay = np.add.reduceat(waited(steps), steps.starts) / np.maximum(sizes - 1, 1)
    longer = _longer(steps, last)
    phased = steps.phased
    found = []
    for known, of in ((phased, phased), (~phased & (delay > 0.0), ~phased)):
        for rank in np.unique(steps.rank[last[known]]):
            mine = known & (steps.rank[last] == rank)
            found.append(
                Straggler(
                    rank=int(rank),
                    node=steps.nodes[int(steps.node[last[mine][0]])],
                    pod=steps.pods[int(rank)],
                    steps=int(mine.sum()),
                    share=float(mine.sum() / of.sum()),
                    delay_ms=float(np.median(delay[mine])),
                    total_ms=float(delay[mine].sum()),
                    phase=_where(longer[mine]) if of is phased else START,
                )
            )
    return sorted(found, key=lambda s: -s.total_ms)


def _where(longer: Floats) -> str:
    return (*(PHASES[i] for i in OWN_PHASES), "other")[int(longer.sum(axis=0).argmax())]


def _longer(steps: Steps, last: Integers) -> Floats:
    """By how much the last rank was longer than the mean of the others, for each step and phase of its own."""
    own = np.array([*(steps.phases[:, i] for i in OWN_PHASES), steps.other]).T
    sums = np.add.reduceat(own, steps.starts, axis=0)
    others = np.maximum(steps.sizes - 1, 1)[:, None]
    difference: Floats = own[last] - (sums - own[last]) / others
    return difference


def imbalance(steps: Steps) -> Floats:
    """What each step would have been shorter, had every rank computed its experts as long as the mean; milliseconds.

    0 where its phases are not known.
    """
    experts = steps.phases[:, EXPERTS]
    slowest = np.maximum.reduceat(experts, steps.starts)
    lost = slowest - np.add.reduceat(experts, steps.starts) / steps.sizes
    lost[~steps.phased] = 0.0
    return lost


def balance_saving_ms(steps: Steps) -> float:
    """The same, of all steps together."""
    return float(imbalance(steps).sum())
