"""Finds the traces of a run, or of a time, in the trace store and reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import PAGE, TempoClient, search_all

HORIZON_S = 6 * 24 * 3600
"""How far back runs are looked for; Tempo by default refuses a search over more than seven days."""
AT_ONCE = 256
"""Traces that are asked for before the first of them is handed on."""
POLL_S = 0.5


def latest_run(store: TempoClient, scenario: str) -> str:
    """The id of the scenario's latest run in the store; UserError when there is none."""
    found = store.search(
        f'{{ name = "{a.BLOCK_SPAN}" && span.{a.SCENARIO} = "{scenario}" }}',
        start_s=_horizon(),
        end_s=_now(),
        limit=PAGE,
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
    return sorted({s.trace_id for s in search_all(store, query, start_s=_horizon(), end_s=_now())})


def load_run(store: TempoClient, run_id: str, *, linked: bool = False) -> Iterator[Trace]:
    """All traces of a run, with ``linked`` then those to which they link; UserError when the store has none."""
    ids = trace_ids(store, run_id)
    if not ids:
        raise UserError(f"the store has no traces of run {run_id}: give another run id, or leave it out for the latest")
    return _with_linked(store, ids) if linked else load(store, ids)


def load_time(store: TempoClient, query: str, start_s: int, end_s: int) -> Iterator[Trace]:
    """All traces with a span that matches a TraceQL query in this time (Unix seconds); UserError without any."""
    ids = [s.trace_id for s in search_all(store, query, start_s=start_s, end_s=end_s)]
    if not ids:
        raise UserError(f"the store has no trace of {query} in this time: give another --since, or look at its log")
    return load(store, ids)


def load(store: TempoClient, ids: Sequence[str]) -> Iterator[Trace]:
    """These traces, one after the other; such as the store does not have are left out."""
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(ids), AT_ONCE):
            some = pool.map(store.trace, ids[start : start + AT_ONCE])
            yield from (trace for trace in some if trace is not None)


def _with_linked(store: TempoClient, ids: Sequence[str]) -> Iterator[Trace]:
    others: set[str] = set()
    for trace in load(store, ids):
        others.update(link.trace_id for span in trace.spans for link in span.links)
        yield trace
    yield from load(store, sorted(others.difference(ids)))


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
