"""max-score-picker: picks the endpoints with the highest scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Picker
from llmtrace.picker.plugins.random_picker import PickerParameters


@REGISTRY.register
class MaxScorePicker(Picker[PickerParameters]):
    """Picks the best; equal scores fall at random."""

    type: ClassVar[str] = "max-score-picker"
    parameters_type = PickerParameters

    def pick(self, endpoints: Sequence[Endpoint], totals: Sequence[float]) -> list[Endpoint]:
        """Pick by score."""
        order = list(range(len(endpoints)))
        random.shuffle(order)
        order.sort(key=totals.__getitem__, reverse=True)
        return [endpoints[index] for index in order[: self.parameters.limit]]
