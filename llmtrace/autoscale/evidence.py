"""What the trace store adds to a decision: the requests that drove it, and when a replica really loaded its model."""

from __future__ import annotations

import json

from llmtrace.autoscale.record import DecisionRecord, Phase, ReplicaRecord
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import Stay, demand, stay
from llmtrace.traces.model import Span
from llmtrace.traces.tempo import TempoClient

LONGEST_S = 600
"""Requests that began longer before a decision are not looked for."""
MOST_READ = 500
MOST_LINKS = 32


def drivers(store: TempoClient, decision: DecisionRecord) -> list[Stay]:
    """The requests that the decision's metric counted in its window, the longest first; UserError from the store.

    At most :data:`MOST_READ` traces are looked at, newest first.
    """
    chosen = next((m for m in decision.metrics if m.name == decision.metric), None)
    if chosen is None:
        return []
    counted = demand(chosen.query)
    until_ns, since_ns = decision.time_ns, decision.time_ns - int(decision.window_ms * 1e6)
    model = f" && span.{a.TARGET_MODEL} = {json.dumps(counted.model)}" if counted.model else ""
    found = store.search(
        f'{{ name = "{a.ORCHESTRATION_SPAN}"{model} }}',
        start_s=since_ns // 10**9 - LONGEST_S,
        end_s=until_ns // 10**9 + 1,
        limit=MOST_READ,
    )
    ids = [s.trace_id for s in found if s.start_ns < until_ns and s.start_ns + (s.duration_ms + 1) * 10**6 > since_ns]
    stays = [s for trace_id in ids if (trace := store.trace(trace_id)) is not None and (s := stay(trace)) is not None]
    return sorted(
        (s for s in stays if counted.counts(s, since_ns, until_ns)),
        key=lambda s: counted.interval(s)[0] - counted.interval(s)[1],
    )


def refine(store: TempoClient, replica: ReplicaRecord) -> None:
    """Take the times of a replica's model load from vLLM's own spans of its start, where the store has them.

    Raises UserError from the store.
    """
    ready = next((p for p in replica.phases if p.name == a.READY_SPAN), None)
    if not replica.up or ready is None:
        return
    found = store.search(
        f'{{ name = "{a.VLLM_CORE_SPAN}" && resource.service.instance.id = {json.dumps(replica.name)} }}',
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


def _replace(replica: ReplicaRecord, ready: Phase, loading: Span, core: Span) -> None:
    times = (replica.started_ns, loading.start_ns, core.end_ns, ready.end_ns)
    if list(times) != sorted(times):
        return  # Clocks that differ, or the spans of another start.
    rest = [p for p in replica.phases if p.name == a.FIRST_REQUEST_SPAN]
    names = (a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN)
    own = [
        Phase(name=name, start_ns=start, end_ns=end, source=a.SOURCE_SPANS)
        for name, start, end in zip(names, times, times[1:], strict=False)
    ]
    replica.phases = [*own, ready.model_copy(update={"start_ns": core.end_ns}), *rest]
