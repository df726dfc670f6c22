"""Counts tokens of experts with torch, as a worker does, and prints the sums; run by the Python of a vLLM environment.

Printed as JSON: what was taken after each scene.
"""

import json
from typing import Any

import torch

from llmtrace.engine.steps.experts import ExpertTokens

EXPERTS = 4
SHARED = EXPERTS
"""An id beyond the logical experts."""

torch.set_num_threads(1)
counts = ExpertTokens(torch, 6)
taken: dict[str, Any] = {}


def layer(*chosen: tuple[int, ...], dtype: torch.dtype = torch.int32) -> None:
    """A layer's router, in the forward pass of a model."""
    with torch.inference_mode():
        counts.count(torch.tensor(chosen, dtype=dtype), EXPERTS)


def take(scene: str) -> None:
    found = counts.take()
    taken[scene] = None if found is None else found.tolist()


counts.begin(2)
counts.end()
take("before any layer")

layer((0, 1), (2, 3))
take("warm-up")

counts.begin(2)
layer((0, 1), (1, 2), (3, 3))
layer((1, 0), (1, 3), (3, 3), dtype=torch.int64)
counts.end()
take("two tokens and a padded one, in two layers")
take("nothing since")

counts.begin(3)
layer((0, 1), (0, SHARED), (0, SHARED + 2))
counts.end()
take("shared experts")

layer((0, 1), (2, 3))
take("a dummy pass")

counts.begin(1)
layer((2, 3))
counts.end()
counts.begin(6)
layer((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2, 3))
layer((0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1))  # more than a batch has
layer((0, 1, 2))  # another model's
counts.end()
take("two steps, and layers of a draft model")

counts.begin(1)
layer((1, 2))
counts.end()
held = counts.take()
counts.begin(1)
layer((1, 2))
counts.end()
taken["what was taken stays"] = held.tolist()

for part in range(2):
    counts = ExpertTokens(torch, 6, part)
    layer((9, 9))
    counts.begin(3)
    layer(*[((0, 1), (0, 2)), ((0, 3), (3, 3))][part])
    counts.end()
    take(f"part {part} of a batch of three tokens and a padded one")

print(json.dumps(taken))
