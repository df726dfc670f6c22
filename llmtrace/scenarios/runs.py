"""Finds the runs of a scenario in the trace store and reads their traces."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient

HORIZON_S = 6 * 24 * 3600
"""How far back runs are looked for; Tempo by default refuses a search over more than seven days."""
LIMIT = 5000
"""The most traces that are read of a run."""
POLL_S = 0.5
THREADS, AHEAD = 4, 8
"""How many traces are read from the store at once, and how many ahead of the one that is looked at."""


def latest_run(store: TempoClient, scenario: str) -> str:
    """The id of the scenario's latest run in the store; UserError when there is none."""
    found = store.search(
        f'{{ name = "{a.BLOCK_SPAN}" && span.{a.SCENARIO} = "{scenario}" }}',
        start_s=_horizon(),
        end_s=_now(),
        limit=LIMIT,
    )
    for summary in sorted(found, key=lambda s: s.start_ns, reverse=True):
        trace = store.trace(summary.trace_id)
        for span in trace.named(a.BLOCK_SPAN) if trace else []:
            run_id = span.attributes.get(a.RUN_ID)
            if isinstance(run_id, str):
                return run_id
    raise UserError(f"the store has no run of {scenario}: run `llmtrace run {scenario}` first")


def trace_ids(store: TempoClient, run_id: str) -> list[str]:
    """The ids of all traces of a run."""
    if not run_id or not run_id.replace("-", "").isalnum():
        raise UserError(f"{run_id!r} is no run id; `llmtrace run` prints them, like 20260131T120000-1a2b")
    query = f'{{ span.{a.RUN_ID} = "{run_id}" }}'
    return sorted({s.trace_id for s in store.search(query, start_s=_horizon(), end_s=_now(), limit=LIMIT)})


def load_run(store: TempoClient, run_id: str) -> list[Trace]:
    """All traces of a run; UserError when the store has none."""
    ids = trace_ids(store, run_id)
    if not ids:
        raise UserError(f"the store has no traces of run {run_id}: give another run id, or leave it out for the latest")
    return list(_read(store, ids))


def linked_traces(store: TempoClient, traces: Sequence[Trace]) -> Iterator[Trace]:
    """The traces to which these link, one after the other: they may be too many to keep."""
    ids = {trace.trace_id for trace in traces}
    others = {link.trace_id for trace in traces for span in trace.spans for link in span.links}
    return _read(store, sorted(others - ids))


def _read(store: TempoClient, ids: Iterable[str]) -> Iterator[Trace]:
    """Those that the store has, in order; a few are asked for ahead of the one that is read."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Future[Trace | None]] = deque()
        for trace_id in ids:
            ahead.append(pool.submit(store.trace, trace_id))
            if len(ahead) > AHEAD and (trace := ahead.popleft().result()) is not None:
                yield trace
        yield from (trace for asked in ahead if (trace := asked.result()) is not None)


def wait_for(
    store: TempoClient, ids: list[str], complete: Callable[[Trace], bool], timeout_s: float
) -> dict[str, Trace | None]:
    """Poll until every trace is complete or the time is up; returns each trace as last seen."""
    seen: dict[str, Trace | None] = dict.fromkeys(ids)
    waiting = list(ids)
    deadline = time.monotonic() + timeout_s
    while True:
        still = []
        for trace_id in waiting:
            trace = seen[trace_id] = store.trace(trace_id)
            if trace is None or not complete(trace):
                still.append(trace_id)
        waiting = still
        if not waiting or time.monotonic() >= deadline:
            return seen
        time.sleep(POLL_S)


def _now() -> int:
    return int(time.time()) + 60


def _horizon() -> int:
    return int(time.time()) - HORIZON_S
