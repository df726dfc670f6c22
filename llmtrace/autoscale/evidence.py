"""What the trace store adds to a decision: the requests that drove it, and when a replica really loaded its model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmtrace.autoscale.record import DecisionRecord, Phase, ReplicaRecord
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Stay, demand, stay
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.tempo import TempoClient, search_all

LONGEST_S = 600
"""Requests that began longer before a decision are not looked for."""
MOST_READ = 500
"""Traces that are read for a decision, and the most that a search for something else gives."""
MOST_LINKS = 32
MOST_FIRST = 8
FIRST_STEP_S = 15
"""A replica's first request is looked for in steps of this many seconds: a search gives the newest."""


@dataclass(frozen=True)
class Drivers:
    """The requests that a decision's metric counted in its window, those that were most of it first.

    ``unread`` is how many there were at that time beside those whose traces were read; some may have driven it, too.
    """

    stays: tuple[Stay, ...] = ()
    unread: int = 0


def drivers(store: TempoClient, decision: DecisionRecord) -> Drivers | None:
    """The requests that drove a decision; None where nobody can tell. UserError from the store.

    At most :data:`MOST_READ` traces are read, those of the longest requests.
    """
    chosen = next((m for m in decision.metrics if m.name == decision.metric), None)
    if chosen is None:
        return Drivers()
    counted = demand(chosen.query)
    if counted.part is None:
        return None
    since_ns, until_ns = decision.window
    model = f" && span.{a.TARGET_MODEL} = {json.dumps(counted.model)}" if counted.model else ""
    found = search_all(
        store,
        f'{{ name = "{a.ORCHESTRATION_SPAN}"{model} }}',
        start_s=since_ns // 10**9 - LONGEST_S,
        end_s=until_ns // 10**9 + 1,
    )
    then = [s for s in found if s.start_ns < until_ns and s.start_ns + (s.duration_ms + 1) * 10**6 > since_ns]
    read = sorted(then, key=lambda s: -s.duration_ms)[:MOST_READ]
    traces = (store.trace(summary.trace_id) for summary in read)
    stays = [s for trace in traces if trace is not None and (s := stay(trace)) is not None]
    mine = sorted((s for s in stays if counted.counts(s, since_ns, until_ns)), key=lambda s: -counted.weight(s))
    return Drivers(tuple(mine), len(then) - len(read))


def refine(store: TempoClient, replica: ReplicaRecord) -> None:
    """Take the times of a replica's model load from vLLM's own spans of its start, where the store has them.

    Raises UserError from the store.
    """
    ready = next((p for p in replica.phases if p.name == a.READY_SPAN), None)
    if not replica.up or ready is None:
        return
    found = store.search(
        f'{{ name = "{a.VLLM_CORE_SPAN}" && {_of(replica)} }}',
        start_s=replica.started_ns // 10**9 - 1,
        end_s=ready.end_ns // 10**9 + 1,
        limit=1,
    )
    trace = store.trace(found[0].trace_id) if found else None
    spans = trace.spans if trace else ()
    loading = next((s for s in spans if s.name in (a.VLLM_LOADING_CPU_SPAN, a.VLLM_LOADING_GPU_SPAN)), None)
    core = next((s for s in spans if s.name == a.VLLM_CORE_SPAN), None)
    if loading is not None and core is not None:
        _replace(replica, ready, loading, core)


def drained(store: TempoClient, replica: ReplicaRecord, namespace: str) -> None:
    """Count the requests on a replica that was stopped, where nobody has; UserError from the store.

    They are those with a span of its server, or that the gateway sent there, as far as the picker names endpoints. One
    that failed is cut, unless the gateway's span says that it ended well: then it went on elsewhere.
    """
    ended_ns = replica.ended_ns
    if replica.up or replica.running is not None or ended_ns is None:
        return
    endpoint = f"{namespace}/{replica.name}"
    query = f'{{ (name = "{a.SERVER_SPAN}" && {_of(replica)}) || span.{a.ENDPOINT_NAME} = {json.dumps(endpoint)} }}'
    found = search_all(store, query, start_s=replica.started_ns // 10**9, end_s=ended_ns // 10**9 + 1)
    replica.running = replica.cut = replica.moved = 0
    for trace in (store.trace(summary.trace_id) for summary in found[:MOST_READ]):
        spans = trace.spans if trace else ()
        own = _served(spans, replica)
        gateway = [s for s in spans if s.name == a.GATEWAY_SPAN]
        sent = [s for s in gateway if s.attributes.get(a.ENDPOINT_NAME) == endpoint]
        there = [s for s in (*own, *sent) if s.start_ns < ended_ns and s.end_ns > replica.started_ns]
        failed = any(s.status == "ERROR" for s in there)
        well = failed and bool(gateway) and all(s.status != "ERROR" for s in gateway)
        replica.running += bool(there)
        replica.moved += well
        replica.cut += failed and not well
    if replica.cut:
        replica.outcome = a.OUTCOME_CUT


def first_token(store: TempoClient, replica: ReplicaRecord, within_s: float) -> int | None:
    """When a replica that is ready gave its first token, in nanoseconds since the epoch, by vLLM's own spans.

    None where the store has no request of it that began within ``within_s`` seconds after. Raises UserError from the
    store.
    """
    ready_ns = next(p.end_ns for p in replica.phases if p.name == a.READY_SPAN)
    step_ns = int(FIRST_STEP_S * 1e9)
    until_ns = ready_ns + int(within_s * 1e9)
    for since_ns in range(ready_ns, until_ns, step_ns):
        found = store.search(
            f'{{ name = "{a.SERVER_SPAN}" && {_of(replica)} }}',
            start_s=since_ns // 10**9,
            end_s=(since_ns + step_ns) // 10**9 + 1,
            limit=MOST_READ,
        )
        first = sorted(found, key=lambda s: s.start_ns)[:MOST_FIRST]
        traces = [trace for summary in first if (trace := store.trace(summary.trace_id)) is not None]
        if tokens := [t for trace in traces for t in _first_tokens(trace, replica)]:
            return max(min(tokens), ready_ns)
    return None


def _first_tokens(trace: Trace, replica: ReplicaRecord) -> Iterator[int]:
    """When each of the replica's requests in a trace gave its first token."""
    for span in _served(trace.spans, replica):
        waited = span.attributes.get(a.VLLM_TTFT)
        if isinstance(waited, int | float):
            yield span.start_ns + int(waited * 1e9)


def _served(spans: Iterable[Span], replica: ReplicaRecord) -> list[Span]:
    """The spans of requests that the replica served, as :func:`_of` finds them."""
    return [s for s in spans if s.name == a.SERVER_SPAN and replica.name in (s.instance, s.resource.get(a.POD_NAME))]


def _of(replica: ReplicaRecord) -> str:
    """A condition on the spans of a replica: a local server's name is its instance's, in a cluster it is the pod's."""
    name = json.dumps(replica.name)
    return f"(resource.service.instance.id = {name} || resource.{a.POD_NAME} = {name})"


def _replace(replica: ReplicaRecord, ready: Phase, loading: Span, core: Span) -> None:
    number = next((n for n, p in enumerate(replica.phases) if p.name == a.CONTAINER_START_SPAN), None)
    if number is None:
        return
    # In a cluster, a pod was scheduled before.
    before = replica.phases[:number]
    times = (replica.phases[number].start_ns, loading.start_ns, core.end_ns, ready.end_ns)
    if list(times) != sorted(times):
        return  # Clocks that differ, or the spans of another start.
    rest = [p for p in replica.phases if p.name == a.FIRST_REQUEST_SPAN]
    names = (a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN)
    own = [
        Phase(name=name, start_ns=start, end_ns=end, source=a.SOURCE_SPANS)
        for name, start, end in zip(names, times, times[1:], strict=False)
    ]
    replica.phases = [*before, *own, ready.model_copy(update={"start_ns": core.end_ns}), *rest]
