"""weighted-random-picker: picks endpoints at random, with chances by score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Picker
from llmtrace.picker.plugins.random_picker import PickerParameters


@REGISTRY.register
class WeightedRandomPicker(Picker[PickerParameters]):
    """Picks without replacement in proportion to the scores (A-Res sampling, Efraimidis and Spirakis 2006).

    Endpoints that score 0 come last; where all do, all chances are equal.
    """

    type: ClassVar[str] = "weighted-random-picker"
    parameters_type = PickerParameters

    def pick(self, endpoints: Sequence[Endpoint], totals: Sequence[float]) -> list[Endpoint]:
        """Pick by keys u^(1/score) of uniform u, the largest first."""
        limit = min(self.parameters.limit, len(endpoints))
        if not any(total > 0 for total in totals):
            return random.sample(endpoints, limit)
        keys = [random.random() ** (1 / total) if total > 0 else -1.0 for total in totals]
        order = sorted(range(len(endpoints)), key=keys.__getitem__, reverse=True)
        return [endpoints[index] for index in order[:limit]]
