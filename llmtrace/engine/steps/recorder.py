"""The phases of one forward pass, as marks of a clock; what they come to is worked out later, elsewhere.

The layers' phases are measured where vLLM does them; what of the model's forward is in none of them is attention with
all that lies between two MoE layers. So the phases of a step never overlap, and add up to the forward pass and the
waiting before it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from llmtrace.engine.steps.batch import Batch
from llmtrace.engine.steps.clocks import Clock
from llmtrace.semconv import attributes as names

DISPATCH, EXPERTS, COMBINE, WAIT = names.PHASE_DISPATCH, names.PHASE_EXPERTS, names.PHASE_COMBINE, names.PHASE_WAIT
_NS_PER_MS = 1_000_000


@dataclass(slots=True)
class Record:
    """One rank's part of one step. ``inside`` are its phases: name, begin, end, in order; begin and end are marks."""

    batch: Batch
    start_ns: int
    begin: Any
    end: Any = None
    forward_begin: Any = None
    forward_end: Any = None
    inside: list[tuple[str, Any, Any]] = field(default_factory=list)
    computed_tokens: int | None = None
    """Tokens of the forward pass, those computed for nobody included."""
    expert_tokens: Any = None
    """A tensor on the host, filled when ``end`` has come."""
    rearrangements: int = 0
    rearrangement_ms: float = 0.0

    @property
    def padded_tokens(self) -> int | None:
        """Tokens computed for nobody; None where the forward was not seen."""
        return None if self.computed_tokens is None else max(self.computed_tokens - self.batch.tokens, 0)


@dataclass(frozen=True, slots=True)
class Phases:
    """Milliseconds of a step; ``layer`` counts the MoE layers from 0 and is the slowest of them."""

    attention: float
    dispatch: float
    experts: float
    combine: float
    wait: float
    layer: int | None
    layer_ms: float


class Recorder:
    """Takes the marks of the present step; ``on`` only while a traced one runs."""

    def __init__(self, clock: Clock) -> None:
        self.on = False
        self.clock = clock
        self._record: Record | None = None
        self._depth = 0
        self._opened: Any = None
        self._rearrangements = 0
        self._rearrangement_ms = 0.0

    def begin(self, batch: Batch) -> None:
        """The worker starts on a step."""
        self._record = Record(batch, time.time_ns(), self.clock.mark())
        self._depth = 0
        self.on = True

    def end(self) -> Record | None:
        """The worker has done, or given, all of it."""
        record, self._record = self._record, None
        self.on = False
        if record is not None:
            record.end = self.clock.mark()
            record.rearrangements, self._rearrangements = self._rearrangements, 0
            record.rearrangement_ms, self._rearrangement_ms = self._rearrangement_ms, 0.0
        return record

    def drop(self) -> None:
        """Forget the present step: vLLM failed in it."""
        self.on, self._record = False, None

    def forward_begins(self, tokens: int | None) -> None:
        """The model's forward, over so many tokens."""
        record = self._record
        if record is not None and record.forward_begin is None:
            record.forward_begin, record.computed_tokens = self.clock.mark(), tokens

    def forward_ends(self) -> None:
        """The model's forward is over."""
        record = self._record
        if record is not None and record.forward_end is None:
            record.forward_end = self.clock.mark()

    def enter(self) -> None:
        """A phase begins; within another one it is a part of that."""
        self._depth += 1
        if self._depth == 1:
            self._opened = self.clock.mark()

    def leave(self, phase: str) -> None:
        """It is over."""
        self._depth -= 1
        record = self._record
        if self._depth or record is None:
            return
        forward = record.forward_begin is not None and record.forward_end is None
        if forward or phase == WAIT:  # a draft model's layers are no part of the forward
            record.inside.append((phase, self._opened, self.clock.mark()))

    def rearranged(self, took_ns: int) -> None:
        """Experts were moved to other ranks, mostly when tokens are sampled after a step; the next record tells it."""
        self._rearrangements += 1
        self._rearrangement_ms += took_ns / _NS_PER_MS


def phases(record: Record, clock: Clock) -> Phases | None:
    """What a record's marks come to; None where the forward's layers were not seen (a replayed CUDA graph)."""
    if record.forward_begin is None or record.forward_end is None:
        return None
    sums = dict.fromkeys((DISPATCH, EXPERTS, COMBINE, WAIT), 0.0)
    before = 0.0
    for name, opened, closed in record.inside:
        took = clock.ms(opened, closed)
        sums[name] += took
        if name == WAIT and clock.ms(record.forward_begin, opened) < 0:
            before += took
    starts = [opened for name, opened, _ in record.inside if name == DISPATCH]
    if not starts:
        return None
    layers = [clock.ms(start, end) for start, end in zip(starts, [*starts[1:], record.forward_end], strict=True)]
    slowest = max(range(len(layers)), key=layers.__getitem__)
    forward = clock.ms(record.forward_begin, record.forward_end)
    return Phases(
        attention=max(forward - (sum(sums.values()) - before), 0.0),
        dispatch=sums[DISPATCH],
        experts=sums[EXPERTS],
        combine=sums[COMBINE],
        wait=sums[WAIT],
        layer=slowest,
        layer_ms=layers[slowest],
    )
