"""The steps of all ranks as columns: millions of rows, read from traces one after the other."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from llmtrace.errors import UserError
from llmtrace.scenarios.facts import integer, items, number, text
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes, AttributeValue, Span, Trace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PHASES = ("attention", "dispatch", "experts", "combine", "wait")
ATTRIBUTES = (a.STEP_ATTENTION, a.STEP_DISPATCH, a.STEP_EXPERTS, a.STEP_COMBINE, a.STEP_WAIT)
"""Of the phases, in their order; milliseconds."""
EXPERTS = PHASES.index("experts")
COLLECTIVES = tuple(PHASES.index(name) for name in ("dispatch", "combine", "wait"))
"""The phases in which a rank may wait for others."""


@dataclass(frozen=True)
class Steps:
    """One row for each step and rank, ordered by step.

    ``starts`` are the first rows of the steps, ``trace_ids`` the steps' traces. ``engine`` is the rank's data-parallel
    engine. ``node`` is an index into ``nodes``, which are in order of name. ``phases`` is rows by :data:`PHASES`,
    milliseconds. ``layer`` is the slowest MoE layer, -1 where it is not told, and ``layer_ms`` how long it took.
    ``partial`` counts the steps that were left out because a rank's span is not there, or there twice, or does not say
    how long its phases were. ``sent`` is ranks by experts: the tokens that each rank sent to each, over the whole steps
    that say so; without columns where none does.
    """

    trace_ids: tuple[str, ...]
    starts: Integers
    rank: Integers
    engine: Integers
    node: Integers
    start_ns: Integers
    end_ns: Integers
    phases: Floats
    tokens: Integers
    padded: Integers
    dummy: NDArray[np.bool_]
    layer: Integers
    layer_ms: Floats
    nodes: tuple[str, ...]
    partial: int
    sent: Integers

    @property
    def count(self) -> int:
        """Steps."""
        return len(self.starts)

    @property
    def sizes(self) -> Integers:
        """Ranks of each step."""
        return np.diff(np.append(self.starts, len(self.rank)))

    @property
    def duration(self) -> Floats:
        """Of each row, milliseconds."""
        return (self.end_ns - self.start_ns) / 1e6

    @property
    def other(self) -> Floats:
        """What the phases leave of each row: preparing the batch, and what comes before and after the layers."""
        rest: Floats = self.duration - self.phases.sum(axis=1)
        return rest

    @property
    def expert_tokens(self) -> Integers:
        """What each expert got from all ranks; empty where no step says so."""
        total: Integers = self.sent.sum(axis=0)
        return total

    def spread(self, of_step: Floats) -> Floats:
        """A value of each step, for each of its rows."""
        return np.repeat(of_step, self.sizes)


def read_steps(traces: Iterable[Trace]) -> Steps:
    """The whole steps among the traces; those of other spans are passed over. UserError where there is none."""
    starts, rank, engine, node = array("q"), array("q"), array("q"), array("q")
    tokens, dummy = array("q"), array("b")
    start_ns, end_ns, phases, padded = array("q"), array("q"), array("d"), array("q")
    layer, layer_ms = array("q"), array("d")
    trace_ids: list[str] = []
    nodes: dict[str, int] = {}
    partial = 0
    sent: dict[int, Integers] = {}
    for trace in traces:
        spans = [span for span in trace.spans if span.name == a.STEP_SPAN]
        if not spans:
            continue
        if not _is_whole(spans):
            partial += 1
            continue
        told = [span.attributes for span in spans]
        trace_ids.append(trace.trace_id)
        starts.append(len(rank))
        rank.extend(cast("list[int]", [t[a.WORLD_RANK] for t in told]))
        engine.extend([integer(t.get(a.DP_RANK)) or 0 for t in told])
        node.extend([nodes.setdefault(text(t.get(a.NODE)), len(nodes)) for t in told])
        start_ns.extend([span.start_ns for span in spans])
        end_ns.extend([span.end_ns for span in spans])
        dummy.extend([bool(t.get(a.STEP_DUMMY)) for t in told])
        tokens.extend([_tokens(t) for t in told])
        for t in told:
            phases.extend(cast("list[float]", [t[name] for name in ATTRIBUTES]))
            padded.append(integer(t.get(a.STEP_PADDED_TOKENS)) or 0)
            slowest = integer(t.get(a.SLOWEST_LAYER))
            layer.append(-1 if slowest is None else slowest)
            layer_ms.append(number(t.get(a.SLOWEST_LAYER_TIME)) or 0.0)
            if counts := items(t.get(a.EXPERT_TOKENS)):
                world = cast("int", t[a.WORLD_RANK])
                sent[world] = _added(sent.get(world, np.zeros(0, dtype=np.int64)), counts)
    if not starts:
        raise UserError(
            "no trace has an engine_step span of every rank: does every rank's model server have llmtrace, "
            "and are its steps sampled?"
        )
    named = sorted(nodes)
    place = np.asarray([named.index(name) for name in nodes], dtype=np.int64)
    return Steps(
        trace_ids=tuple(trace_ids),
        starts=np.frombuffer(starts, dtype=np.int64),
        rank=np.frombuffer(rank, dtype=np.int64),
        engine=np.frombuffer(engine, dtype=np.int64),
        node=place[np.frombuffer(node, dtype=np.int64)],
        start_ns=np.frombuffer(start_ns, dtype=np.int64),
        end_ns=np.frombuffer(end_ns, dtype=np.int64),
        phases=np.frombuffer(phases, dtype=np.float64).reshape(-1, len(PHASES)),
        tokens=np.frombuffer(tokens, dtype=np.int64),
        padded=np.frombuffer(padded, dtype=np.int64),
        dummy=np.frombuffer(dummy, dtype=np.int8).astype(np.bool_),
        layer=np.frombuffer(layer, dtype=np.int64),
        layer_ms=np.frombuffer(layer_ms, dtype=np.float64),
        nodes=tuple(named),
        partial=partial,
        sent=_matrix(sent, 1 + max(rank)),
    )


def _is_whole(spans: Sequence[Span]) -> bool:
    """Whether the step has one span of each of its ranks, and each says what is read of it."""
    ranks = [span.attributes.get(a.WORLD_RANK) for span in spans]
    if not all(isinstance(rank, int) for rank in ranks) or len(set(ranks)) != len(spans):
        return False
    if len(spans) != spans[0].attributes.get(a.STEP_RANKS):
        return False
    return all(isinstance(span.attributes.get(name), int | float) for span in spans for name in ATTRIBUTES)


def _tokens(told: Attributes) -> int:
    return (integer(told.get(a.STEP_PREFILL_TOKENS)) or 0) + (integer(told.get(a.STEP_DECODE_TOKENS)) or 0)


def _added(total: Integers, counts: Sequence[AttributeValue]) -> Integers:
    """The sum of two counts of tokens by expert, of which one may know fewer experts."""
    found = np.asarray(counts, dtype=np.int64)
    size = max(len(total), len(found))
    return np.pad(total, (0, size - len(total))) + np.pad(found, (0, size - len(found)))


def _matrix(sent: dict[int, Integers], ranks: int) -> Integers:
    matrix = np.zeros((ranks, max((len(row) for row in sent.values()), default=0)), dtype=np.int64)
    for world, row in sent.items():
        matrix[world, : len(row)] = row
    return matrix
