"""The steps of all ranks as columns: millions of rows, read from traces one after the other."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from llmtrace.errors import UserError
from llmtrace.scenarios.facts import items, text
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes, AttributeValue, Trace

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)

PHASES = ("attention", "dispatch", "experts", "combine", "wait")
ATTRIBUTES = (a.STEP_ATTENTION, a.STEP_DISPATCH, a.STEP_EXPERTS, a.STEP_COMBINE, a.STEP_WAIT)
"""Of the phases, in their order; milliseconds."""
PARTS = (*PHASES, "other", "unknown")
"""What a step's time is made of; it is unknown where a step does not say its phases."""
EXPERTS = PHASES.index("experts")
COLLECTIVES = tuple(PHASES.index(name) for name in ("dispatch", "combine", "wait"))
"""The phases in which a rank may wait for others."""
COLUMNS: dict[str, AttributeValue] = {
    **dict.fromkeys((a.WORLD_RANK, a.STEP_RANKS)),
    **dict.fromkeys(ATTRIBUTES, math.nan),
    **dict.fromkeys((a.DP_RANK, a.STEP_DUMMY, a.STEP_PREFILL_TOKENS, a.STEP_DECODE_TOKENS, a.STEP_PADDED_TOKENS), 0),
    a.SLOWEST_LAYER: -1,
    a.SLOWEST_LAYER_TIME: 0.0,
    a.NODE: "",
    a.STEP_REASON: a.REASON_SAMPLED,
}
"""What is read of each span, and what stands for it where a span does not say it; None: its step does not count."""
TIMES = frozenset((a.SLOWEST_LAYER_TIME, *ATTRIBUTES))
"""Those that are no whole numbers."""
WORDS = (a.NODE, a.STEP_REASON)
"""Those that are no numbers."""
_all = itemgetter(*COLUMNS)


@dataclass(frozen=True)
class Steps:
    """One row for each step and rank, ordered by step.

    ``starts`` are the first rows of the steps, ``trace_ids`` the steps' traces. ``engine`` is the rank's data-parallel
    engine. ``node`` is an index into ``nodes``, which are in order of name. ``phases`` is rows by :data:`PHASES`,
    milliseconds, not a number where the span says none of them. ``layer`` is the slowest MoE layer, -1 where it is
    not told, and ``layer_ms`` how long it took. ``partial`` counts the steps that were left out because a rank's span
    is not there, or there twice, or says some of its phases only. ``sent`` is ranks by experts: the tokens that each
    rank sent to each, over the whole steps that say so; without columns where none does. ``pods`` are the ranks' pods
    in the last of their steps, "" where it is not told. ``on_demand`` tells of each step that it was traced for a slow
    request and is none of the sample of one in so many.
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
    pods: tuple[str, ...]
    on_demand: NDArray[np.bool_]

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
    def phased(self) -> NDArray[np.bool_]:
        """Of each step, whether all its ranks say their phases; where CUDA graphs are replayed, none does."""
        found: NDArray[np.bool_] = ~np.logical_or.reduceat(np.isnan(self.phases[:, 0]), self.starts)
        return found

    @property
    def other(self) -> Floats:
        """What the phases leave of each row: preparing the batch, and what comes before and after the layers."""
        rest: Floats = self.duration - self.phases.sum(axis=1)
        return rest

    @property
    def parts(self) -> Floats:
        """Rows by :data:`PARTS`, milliseconds: they add up to the row's duration."""
        phased = self.spread(self.phased)
        found = np.array([*self.phases.T, self.other, np.zeros(len(phased))]).T
        found[~phased] = 0.0
        found[~phased, -1] = self.duration[~phased]
        return found

    @property
    def expert_tokens(self) -> Integers:
        """What each expert got from all ranks; empty where no step says so."""
        total: Integers = self.sent.sum(axis=0)
        return total

    def spread(self, of_step: NDArray[Number]) -> NDArray[Number]:
        """A value of each step, for each of its rows."""
        return np.repeat(of_step, self.sizes)

    def sampled(self) -> Steps:
        """The sample alone, whose shares are those of all steps. UserError where there is none of it."""
        if not self.on_demand.any():
            return self
        kept = ~self.on_demand
        if not kept.any():
            raise UserError(
                "all steps were traced on demand, none as one in so many: is LLMTRACE_STEP_EVERY too large?"
            )
        sizes = self.sizes
        rows = np.repeat(kept, sizes)
        columns = {item.name: getattr(self, item.name)[rows] for item in fields(self) if item.name in _ROWS}
        starts = np.append(0, np.cumsum(sizes[kept])[:-1])
        trace_ids = tuple(trace_id for trace_id, keep in zip(self.trace_ids, kept, strict=True) if keep)
        return replace(self, trace_ids=trace_ids, starts=starts, on_demand=self.on_demand[kept], **columns)


_ROWS = frozenset(
    (
        *("rank", "engine", "node", "start_ns", "end_ns", "phases"),
        *("tokens", "padded", "dummy", "layer", "layer_ms"),
    )
)
"""Columns of :class:`Steps` with a row for each step and rank."""


def read_steps(traces: Iterable[Trace], left_out: Callable[[Trace], object] = lambda _trace: None) -> Steps:
    """The whole steps among the traces; those of other spans are passed over. UserError where there is none.

    ``left_out`` is called with each trace of a step that is not whole.
    """
    columns = {name: array("d" if name in TIMES else "q") for name in COLUMNS if name not in WORDS}
    on_demand: list[bool] = []
    starts, node, start_ns, end_ns = array("q"), array("q"), array("q"), array("q")
    trace_ids: list[str] = []
    nodes: dict[str, int] = {}
    partial = 0
    sent: dict[int, Integers] = {}
    pods: dict[int, AttributeValue] = {}
    for trace in traces:
        spans = [span for span in trace.spans if span.name == a.STEP_SPAN]
        if not spans:
            continue
        told = _told([span.attributes for span in spans])
        if told is None:
            partial += 1
            left_out(trace)
            continue
        trace_ids.append(trace.trace_id)
        starts.append(len(node))
        on_demand.append(told.pop(a.STEP_REASON)[0] == a.REASON_ON_DEMAND)
        node.extend([nodes.setdefault(text(name), len(nodes)) for name in told.pop(a.NODE)])
        start_ns.extend([span.start_ns for span in spans])
        end_ns.extend([span.end_ns for span in spans])
        ranks = cast("array[int]", told[a.WORLD_RANK])
        pods.update(zip(ranks, [span.resource.get(a.POD_NAME) for span in spans], strict=True))
        for name, values in told.items():
            columns[name].extend(cast("array[int]", values))
        for span in spans:
            if counts := items(span.attributes.get(a.EXPERT_TOKENS)):
                world = cast("int", span.attributes[a.WORLD_RANK])
                sent[world] = _added(sent.get(world, np.zeros(0, dtype=np.int64)), counts)
    if not starts:
        raise UserError(
            "no trace has an engine_step span of every rank: does every rank's model server have llmtrace, "
            "and are its steps sampled?"
        )
    named = sorted(nodes)
    place = np.asarray([named.index(name) for name in nodes], dtype=np.int64)

    def whole(name: str) -> Integers:
        return np.frombuffer(columns[name], dtype=np.int64)

    rank = whole(a.WORLD_RANK)
    return Steps(
        trace_ids=tuple(trace_ids),
        starts=np.frombuffer(starts, dtype=np.int64),
        rank=rank,
        engine=whole(a.DP_RANK),
        node=place[np.frombuffer(node, dtype=np.int64)],
        start_ns=np.frombuffer(start_ns, dtype=np.int64),
        end_ns=np.frombuffer(end_ns, dtype=np.int64),
        # By column in memory: what is asked of them is by column too.
        phases=np.array([np.frombuffer(columns[name], dtype=np.float64) for name in ATTRIBUTES]).T,
        tokens=whole(a.STEP_PREFILL_TOKENS) + whole(a.STEP_DECODE_TOKENS),
        padded=whole(a.STEP_PADDED_TOKENS),
        dummy=whole(a.STEP_DUMMY).astype(np.bool_),
        layer=whole(a.SLOWEST_LAYER),
        layer_ms=np.frombuffer(columns[a.SLOWEST_LAYER_TIME], dtype=np.float64),
        nodes=tuple(named),
        partial=partial,
        sent=_matrix(sent, 1 + int(rank.max())),
        pods=tuple(text(pods.get(world)) for world in range(1 + int(rank.max()))),
        on_demand=np.asarray(on_demand, dtype=np.bool_),
    )


def _told(spans: Sequence[Attributes]) -> dict[str, Sequence[AttributeValue] | array[Any]] | None:
    """The columns of a step; None where it has not one span of each of its ranks that says what is read of it."""
    try:
        rows = [_all(told) for told in spans]
    except KeyError:
        rows = [_all({**COLUMNS, **told}) for told in spans]
    found: dict[str, Sequence[AttributeValue] | array[Any]] = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    try:
        for name in COLUMNS:
            if name not in WORDS:
                found[name] = array("d" if name in TIMES else "q", cast("Sequence[int]", found[name]))
    except (TypeError, OverflowError):
        return None
    unsaid = np.isnan(cast("Any", [found[name] for name in ATTRIBUTES]))
    is_whole = (
        len(spans) == found[a.STEP_RANKS][0]
        and len(set(found[a.WORLD_RANK])) == len(spans)
        and bool((unsaid == unsaid[0]).all())
    )
    return found if is_whole else None


def _added(total: Integers, counts: Sequence[AttributeValue]) -> Integers:
    """The sum of two counts of tokens by expert, of which one may know fewer experts; one that is none adds nothing."""
    try:
        # Of all ways from a list to an array the fastest, and a trace of many ranks has many lists.
        found = np.frombuffer(struct.pack(f"{len(counts)}q", *counts), dtype=np.int64)
    except struct.error:
        return total
    if len(found) == len(total):
        return total + found
    size = max(len(total), len(found))
    return np.pad(total, (0, size - len(total))) + np.pad(found, (0, size - len(found)))


def _matrix(sent: dict[int, Integers], ranks: int) -> Integers:
    matrix = np.zeros((ranks, max((len(row) for row in sent.values()), default=0)), dtype=np.int64)
    for world, row in sent.items():
        matrix[world, : len(row)] = row
    return matrix
