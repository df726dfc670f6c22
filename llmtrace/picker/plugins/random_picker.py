"""random-picker: picks endpoints at random, whatever their scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Parameters, Picker


class PickerParameters(Parameters):
    """``max_num_of_endpoints``: how many endpoints are named; all but the first are fallbacks. Below 1 means 1."""

    max_num_of_endpoints: int = 1

    @property
    def limit(self) -> int:
        """The limit in force."""
        return max(self.max_num_of_endpoints, 1)


@REGISTRY.register
class RandomPicker(Picker[PickerParameters]):
    """Picks with equal chances."""

    type: ClassVar[str] = "random-picker"
    parameters_type = PickerParameters

    def pick(self, endpoints: Sequence[Endpoint], totals: Sequence[float]) -> list[Endpoint]:
        """Pick at random."""
        return random.sample(endpoints, min(self.parameters.limit, len(endpoints)))
