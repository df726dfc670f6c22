"""How evenly the tokens went to the experts."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.wide_ep.steps import Integers

MOST_LISTED = 8


class ExpertLoad(BaseModel):
    """Tokens of all experts. ``entropy`` is 1 where all have as many and 0 where one has all.

    ``top`` are the experts with most tokens, ``shares`` their shares of all tokens.
    """

    model_config = ConfigDict(frozen=True)
    experts: int
    tokens: int
    max_over_mean: float
    entropy: float
    top: list[int]
    shares: list[float]


def expert_load(tokens: Integers) -> ExpertLoad | None:
    """The load, from the tokens of each expert; None of no tokens."""
    total = int(tokens.sum())
    if not total:
        return None
    shares = tokens / total
    positive = shares[shares > 0]
    entropy = -(positive * np.log(positive)).sum() / np.log(len(tokens)) if len(tokens) > 1 else 1.0
    order = np.argsort(-tokens, kind="stable")[:MOST_LISTED]
    return ExpertLoad(
        experts=len(tokens),
        tokens=total,
        max_over_mean=float(shares.max() * len(tokens)),
        entropy=float(entropy),
        top=[int(i) for i in order],
        shares=[float(shares[i]) for i in order],
    )
