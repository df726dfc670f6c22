"""How close the load of the experts in sampled steps comes to that in all steps.

    python -m bench.expert_sample

A made-up load: each request prefers experts of its own, around what all prefer, and is replaced by another one when it
is over, whose prompt is computed in one step.
"""

from __future__ import annotations

import numpy as np

from llmtrace.engine.steps.ids import EVERY_DEFAULT
from llmtrace.scenarios.wide_ep.experts import ExpertLoad, expert_load
from llmtrace.scenarios.wide_ep.steps import Integers

RANKS, STEPS, EXPERTS, CHOICES = 16, 10_000, 256, 8
REQUESTS = 64
"""Of a rank, at once."""
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 200
PREFERENCE, OWN = 3.0, 0.5
"""Concentration of what all prefer, and, by expert, of what a request does around it."""


def rank_load(chance: np.random.Generator, preferred: np.ndarray) -> tuple[Integers, Integers]:
    """Tokens of each expert from one rank: in all steps, and in sampled ones."""
    own = chance.dirichlet(preferred * EXPERTS * OWN, REQUESTS)
    age = chance.integers(0, OUTPUT_TOKENS, REQUESTS)
    every, sampled = np.zeros(EXPERTS, np.int64), np.zeros(EXPERTS, np.int64)
    for number in range(1, STEPS + 1):
        over = age >= OUTPUT_TOKENS
        own[over], age[over] = chance.dirichlet(preferred * EXPERTS * OWN, over.sum()), 0
        tokens = np.where(over, PROMPT_TOKENS, 1)
        step = chance.multinomial(tokens.sum() * CHOICES, tokens @ own / tokens.sum())
        every += step
        if number % EVERY_DEFAULT == 0:
            sampled += step
        age += 1
    return every, sampled


def compared(name: str, every: Integers, sampled: Integers) -> str:
    """One line for people."""
    loads = [load for tokens in (every, sampled) if (load := expert_load(tokens)) is not None]
    one, two = loads
    off = np.median(np.abs(sampled / sampled.sum() / (every / every.sum()) - 1))
    same = len({*one.top} & {*two.top})
    return (
        f"{name}: {_said(one)} in all steps, {_said(two)} in sampled ones; {same} of the {len(one.top)} fullest are "
        f"the same; a share is off by {off:.1%} in the median"
    )


def _said(load: ExpertLoad) -> str:
    return f"maximum over mean {load.max_over_mean:.2f} and entropy {load.entropy:.3f}"


def main() -> None:
    """Print the comparison for one rank and for all."""
    chance = np.random.default_rng(1)
    preferred = chance.dirichlet(np.full(EXPERTS, PREFERENCE))
    loads = np.array([rank_load(chance, preferred) for _ in range(RANKS)])
    print(compared("one rank", *loads[0]))
    print(compared(f"{RANKS} ranks", *loads.sum(axis=0)))


if __name__ == "__main__":
    main()
