"""Sums over the traced steps of one rank, as metrics: what dashboards and alerts see of steps.

Every series names its group of ranks and its rank, for all workers of a pod send under one ``service.instance.id``. So
a rank has 11 series, and one for each expert that it tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from llmtrace.engine.steps.recorder import Phases, Record
from llmtrace.semconv import attributes as names

PHASES = (
    *(names.PHASE_ATTENTION, names.PHASE_DISPATCH, names.PHASE_EXPERTS),
    *(names.PHASE_COMBINE, names.PHASE_WAIT, names.PHASE_OTHER),
)
WORKS = (names.WORK_PREFILL, names.WORK_DECODE, names.WORK_PADDING)
MOST_EXPERT_SERIES = 16_384
"""In a group: of more ranks times experts, every second rank tells its experts' tokens, or every third, and so on."""


class Totals:
    """The sums of the rank ``world`` of ``ranks`` on ``node``. One thread adds, another one reads."""

    def __init__(self, world: int, ranks: int, node: str) -> None:
        self._world = world
        self._ranks = ranks
        self._rank: dict[str, str | int] = {names.WORLD_RANK: world, names.NODE: node}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._tokens = dict.fromkeys(WORKS, 0)
        self._steps = {False: 0, True: 0}
        self._experts: list[int] = []

    def add(self, record: Record, found: Phases | None, lasted_ms: float) -> None:
        """A traced step is over; of one without phases no time counts, so that they can be compared with the whole."""
        batch = record.batch
        self._rank[names.STEP_GROUP] = batch.group
        self._steps[batch.dummy] += 1
        self._tokens[names.WORK_PREFILL] += batch.prefill_tokens
        self._tokens[names.WORK_DECODE] += batch.decode_tokens
        self._tokens[names.WORK_PADDING] += record.padded_tokens or 0
        if found is not None:
            parts = (found.attention, found.dispatch, found.experts, found.combine, found.wait)
            for phase, ms in zip(PHASES, (*parts, max(lasted_ms - sum(parts), 0.0)), strict=True):
                self._seconds[phase] += ms / 1e3
        if record.expert_tokens is not None:
            tokens: list[int] = record.expert_tokens.tolist()
            self._experts = [a + b for a, b in zip(self._experts or [0] * len(tokens), tokens, strict=True)]

    def publish(self, meter: Meter) -> None:
        """Offer the sums as counters from now on; nothing is told before the first step."""
        for metric, unit, name, values in (
            (names.STEP_TIME_METRIC, "s", names.STEP_PHASE, lambda: self._seconds),
            (names.STEPS_METRIC, "{step}", names.STEP_DUMMY, lambda: self._steps),
            (names.STEP_TOKENS_METRIC, "{token}", names.STEP_WORK, lambda: self._tokens),
            (names.EXPERT_LOAD_METRIC, "{token}", names.EXPERT_ID, self._told_experts),
        ):
            meter.create_observable_counter(metric, [partial(self._observed, name, values)], unit)

    def _observed(
        self, name: str, values: Callable[[], Mapping[Any, float]], _options: CallbackOptions
    ) -> list[Observation]:
        rank = {**self._rank}
        if names.STEP_GROUP not in rank:
            return []
        return [Observation(value, {**rank, name: key}) for key, value in {**values()}.items()]

    def _told_experts(self) -> Mapping[int, int]:
        every = max(-(-self._ranks * len(self._experts) // MOST_EXPERT_SERIES), 1)
        return {} if self._world % every else dict(enumerate(self._experts))
