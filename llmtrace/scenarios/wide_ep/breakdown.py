"""Where the steps' time goes, by rank, node and layer."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.wide_ep.steps import Floats, Integers, Steps
from llmtrace.scenarios.wide_ep.waiting import waited


class Share(BaseModel):
    """A rank, with its pod if it is in one, or all ranks of a node.

    ``ms`` are means over its steps by part of :data:`~llmtrace.scenarios.wide_ep.steps.PARTS`; together, ``step_ms``.
    ``waited_ms`` is what of the collectives it waited for the last rank, in the mean; ``dummy`` and ``padded`` are
    steps and tokens that it computed for nobody.
    """

    model_config = ConfigDict(frozen=True)
    rank: int | None
    node: str
    pod: str
    steps: int
    tokens: int
    dummy: int
    padded: int
    step_ms: float
    ms: list[float]
    waited_ms: float


class Layer(BaseModel):
    """A MoE layer that was the slowest of a rank's step: how often, and how long it took then in the mean."""

    model_config = ConfigDict(frozen=True)
    layer: int
    times: int
    ms: float


def by_rank(steps: Steps) -> list[Share]:
    """A share for each rank, in order."""
    node = np.zeros(int(steps.rank.max()) + 1, dtype=np.int64)
    node[steps.rank] = steps.node
    found = _shares(steps, steps.rank)
    return [
        share.model_copy(update={"node": steps.nodes[int(node[rank])], "pod": steps.pods[rank]})
        for share in found
        if (rank := share.rank) is not None
    ]


def by_node(steps: Steps) -> list[Share]:
    """A share for each node, in order of name."""
    found = _shares(steps, steps.node)
    return [share.model_copy(update={"node": steps.nodes[share.rank or 0], "rank": None}) for share in found]


def slowest_layers(steps: Steps) -> list[Layer]:
    """The layers that were slowest, those first that were so most often."""
    told = steps.layer >= 0
    layers, times = np.unique(steps.layer[told], return_counts=True)
    found = [
        Layer(layer=int(layer), times=int(count), ms=float(steps.layer_ms[steps.layer == layer].mean()))
        for layer, count in zip(layers, times, strict=True)
    ]
    return sorted(found, key=lambda layer: -layer.times)


def _shares(steps: Steps, key: Integers) -> list[Share]:
    counts = np.bincount(key)
    parts = steps.parts

    def mean(values: Floats) -> Floats:
        total: Floats = np.bincount(key, weights=values, minlength=len(counts)) / np.maximum(counts, 1)
        return total

    means = np.column_stack([mean(parts[:, i]) for i in range(parts.shape[1])])
    lasted, waits = mean(steps.duration), mean(waited(steps))
    tokens, padded = (np.bincount(key, weights=v, minlength=len(counts)) for v in (steps.tokens, steps.padded))
    dummy = np.bincount(key, weights=steps.dummy, minlength=len(counts))
    return [
        Share(
            rank=int(i),
            node="",
            pod="",
            steps=int(counts[i]),
            tokens=int(tokens[i]),
            dummy=int(dummy[i]),
            padded=int(padded[i]),
            step_ms=float(lasted[i]),
            ms=[float(v) for v in means[i]],
            waited_ms=float(waits[i]),
        )
        for i in np.flatnonzero(counts)
    ]
