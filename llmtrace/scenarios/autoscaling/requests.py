"""The requests of a run as columns, so that a day's million of them can be asked a thousand times."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from llmtrace.scenarios.autoscaling.decisions import Decision, read_decision
from llmtrace.scenarios.facts import Block, read_blocks, text
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Demand, Part, Stay, Unit, stay
from llmtrace.traces.model import Attributes, Trace

FIRST_NUMBER = Stay._fields.index("arrived_ns")
"""From here on, the fields of a stay are numbers."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Overlaps:
    """Intervals of time, of which sums can be had for any window.

    Times in nanoseconds, sums in seconds times weights.
    """

    def __init__(self, starts: Ints, ends: Ints, weights: Floats | None = None) -> None:
        by_start, by_end = np.argsort(starts, kind="stable"), np.argsort(ends, kind="stable")
        self._starts, self._ends = starts[by_start], ends[by_end]
        weights = np.ones(len(starts)) if weights is None else weights
        # Seconds since the first start: nanoseconds since 1970 would lose their last digits in the sums.
        self._origin = int(self._starts[0]) if len(starts) else 0
        self._of_starts = self._sums(self._starts, weights[by_start])
        self._of_ends = self._sums(self._ends, weights[by_end])

    def _sums(self, times: Ints, weights: Floats) -> tuple[Floats, Floats]:
        """Running sums of the weights, and of the weights times the times."""
        seconds = (times - self._origin) / 1e9
        return np.concatenate([[0.0], np.cumsum(weights)]), np.concatenate([[0.0], np.cumsum(weights * seconds)])

    def _until(self, time_ns: int) -> float:
        """The sum of all time before ``time_ns``."""
        at = (time_ns - self._origin) / 1e9
        total = 0.0
        for times, (count, moment), sign in (
            (self._starts, self._of_starts, 1.0),
            (self._ends, self._of_ends, -1.0),
        ):
            index = int(np.searchsorted(times, time_ns, side="right"))
            total += sign * (at * count[index] - moment[index])
        return total

    def between(self, start_ns: int, end_ns: int) -> float:
        """The time that the intervals spend in the window, each times its weight, in seconds."""
        return max(self._until(end_ns) - self._until(start_ns), 0.0) if end_ns > start_ns else 0.0

    def count(self, times_ns: Ints) -> Ints:
        """How many intervals hold each of these times."""
        started = np.searchsorted(self._starts, times_ns, side="right")
        return started - np.searchsorted(self._ends, times_ns, side="right")

    def at(self, time_ns: int) -> int:
        """How many intervals hold this time."""
        return int(self.count(np.asarray([time_ns], dtype=np.int64))[0])

    def touched(self, start_ns: int, end_ns: int) -> int:
        """How many intervals hold some of the window."""
        begun = int(np.searchsorted(self._starts, end_ns, side="left"))
        return begun - int(np.searchsorted(self._ends, start_ns, side="right"))

    @cached_property
    def _bounds(self) -> tuple[Ints, Ints]:
        """The times at which the number changes, and the number from each on."""
        times = np.unique(np.concatenate([self._starts, self._ends]))
        return times, self.count(times)

    def onset(self, time_ns: int) -> int:
        """Since when there was always an interval until ``time_ns``; that time itself where there is none then."""
        times, counts = self._bounds
        index = int(np.searchsorted(times, time_ns, side="right")) - 1
        if index < 0 or counts[index] == 0:
            return time_ns
        empty = self._empties
        last = int(np.searchsorted(empty, index, side="right")) - 1
        return int(times[empty[last] + 1] if last >= 0 else times[0])

    @cached_property
    def _empties(self) -> NDArray[np.intp]:
        return np.flatnonzero(self._bounds[1] == 0)

    def extremes(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        """The fewest and the most intervals at the same time in the window."""
        times, counts = self._bounds
        low, high = (int(np.searchsorted(times, t, side="right")) for t in (start_ns, end_ns))
        inside = [self.at(start_ns), *counts[low:high].tolist()]
        return min(inside), max(inside)


@dataclass(frozen=True)
class RequestTable:
    """A column for each fact of the requests at the gateway. Times in nanoseconds since the epoch.

    ``tokens`` are prompt and answer together, ``prompt_tokens`` those of the prompt that were in no cache; ``models``
    and ``kinds`` number the names in ``model_names`` and ``kind_names``, a kind being the workload's, or empty.
    """

    trace_ids: list[str]
    arrived: Ints
    dispatched: Ints
    first_token: Ints
    ended: Ints
    tokens: Floats
    prompt_tokens: Ints
    models: Ints
    kinds: Ints
    model_names: list[str]
    kind_names: list[str]

    def __len__(self) -> int:
        return len(self.trace_ids)

    def interval(self, part: Part) -> tuple[Ints, Ints]:
        """Start and end of this part of each request's stay."""
        if part is Part.WAITING:
            return self.arrived, self.dispatched
        return self.dispatched, self.first_token if part is Part.PREFILLING else self.ended

    def of_model(self, name: str | None) -> NDArray[np.intp]:
        """The rows of a model's requests; all of them for None."""
        if name is None:
            return np.arange(len(self))
        number = self.model_names.index(name) if name in self.model_names else -1
        return np.flatnonzero(self.models == number)

    @cached_property
    def waiting(self) -> Overlaps:
        """The waits of all requests."""
        return Overlaps(self.arrived, self.dispatched)

    @cached_property
    def waiting_tokens(self) -> Overlaps:
        """The waits of all requests, each times its tokens."""
        return Overlaps(self.arrived, self.dispatched, self.tokens)


@dataclass(frozen=True)
class Counted:
    """The requests that a query counts: their rows in order of their start, their intervals, and how much each is."""

    rows: NDArray[np.intp]
    starts: Ints
    ends: Ints
    weights: Ints
    overlaps: Overlaps
    longest_ns: int

    @classmethod
    def make(cls, table: RequestTable, rows: NDArray[np.intp], counted: Demand) -> Counted:
        """Those of these rows that have the part of a stay that is counted; none where nobody can tell."""
        if counted.part is None:
            rows = rows[:0]
        starts, ends = (column[rows] for column in table.interval(counted.part or Part.RUNNING))
        stays = ends > starts
        rows, starts, ends = rows[stays], starts[stays], ends[stays]
        order = np.argsort(starts, kind="stable")
        rows, starts, ends = rows[order], starts[order], ends[order]
        longest = int((ends - starts).max()) if len(rows) else 0
        weights = table.prompt_tokens[rows] if counted.unit is Unit.TOKENS else ends - starts
        return cls(rows, starts, ends, weights, Overlaps(starts, ends), longest)

    def within(self, since_ns: int, until_ns: int) -> NDArray[np.intp]:
        """The rows of those that were counted at some time of the window, those that are most of it first."""
        first = int(np.searchsorted(self.starts, since_ns - self.longest_ns, side="left"))
        last = int(np.searchsorted(self.starts, until_ns, side="left"))
        found = np.flatnonzero(self.ends[first:last] > since_ns) + first
        return self.rows[found[np.argsort(-self.weights[found], kind="stable")]]


def read_all(traces: Iterable[Trace]) -> tuple[RequestTable, list[Decision], list[Block], str]:
    """Requests, decisions, blocks, and the model's name, in one pass; traces may be a stream. Warm-up requests are left
    out."""
    ids: list[str] = []
    numbers = array("q")
    decisions: list[Decision] = []
    others: list[Trace] = []
    models: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for trace in traces:
        found = stay(trace)
        if found is None:
            decision = read_decision(trace)
            if decision is not None:
                decisions.append(decision)
            else:
                others.append(trace)
            continue
        about = _client(trace)
        if about.get(a.WARMUP):
            continue
        ids.append(trace.trace_id)
        kind = kinds.setdefault(text(about.get(a.TENANT)), len(kinds))
        model = models.setdefault(found.model, len(models))
        numbers.extend((*cast("tuple[int, ...]", found[FIRST_NUMBER:]), model, kind))
    arrived, dispatched, first_token, ended, tokens, prompts, models_of, kinds_of = (
        np.asarray(numbers, dtype=np.int64).reshape(-1, 8).T.copy()
    )
    table = RequestTable(
        ids,
        arrived,
        dispatched,
        first_token,
        ended,
        tokens.astype(np.float64),
        prompts,
        models_of,
        kinds_of,
        list(models),
        list(kinds),
    )
    blocks = read_blocks(others)
    return table, decisions, blocks, next((b.model for b in blocks), ", ".join(sorted(table.model_names)))


def _client(trace: Trace) -> Attributes:
    """What the workload's client says of a request; nothing of one that somebody else sent."""
    for span in trace.spans:
        if span.resource.get("service.name") == a.CLIENT_SERVICE:
            return span.attributes
    return {}
