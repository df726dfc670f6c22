"""A trace as a tree for the terminal, with a time bar and the attributes that matter."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.traces.model import AttributeValue, Span, Trace
from llmtrace.units import bytes_text

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red", "bright_cyan", "bright_magenta")
HIDDEN = ("gen_ai.request.id", "gen_ai.operation.name", "llmtrace.scenario.name", "llmtrace.scenario.run_id")
SHOWN: dict[str, dict[str, str]] = {
    "chat *": {
        "llmtrace.scenario.arm": "arm",
        "llmtrace.tenant": "tenant",
        "llmtrace.turn": "turn",
        "gen_ai.usage.input_tokens": "prompt",
        "gen_ai.usage.cache_read.input_tokens": "cached",
        "gen_ai.usage.output_tokens": "output",
        "llmtrace.client.ttft_ms": "ttft ms",
    },
    "gateway.request": {
        "llmtrace.endpoint.name": "endpoint",
        "gen_ai.usage.cache_read.input_tokens": "cached",
        "llmtrace.gateway.ttft_ms": "ttft ms",
    },
    "engine_step": {
        "llmtrace.step.number": "step",
        "llmtrace.rank.world": "rank",
        "llmtrace.rank.node": "node",
        "llmtrace.step.dummy": "dummy",
        "llmtrace.step.prefill_tokens": "prefill tokens",
        "llmtrace.step.decode_tokens": "decode tokens",
        "llmtrace.step.attention_ms": "attention ms",
        "llmtrace.step.dispatch_ms": "dispatch ms",
        "llmtrace.step.experts_ms": "experts ms",
        "llmtrace.step.combine_ms": "combine ms",
        "llmtrace.step.wait_ms": "wait ms",
    },
    "ingress": {"http.status_code": "status", "request_size": "bytes in", "response_size": "bytes out"},
    "async * egress": {"upstream_cluster": "to"},
    "router * egress": {"upstream_address": "to"},
    "gateway.request_orchestration": {"target_model": "model"},
    "run_scheduler_profile": {"llm_d.epp.scheduling.profile.name": "profile"},
    "filter_endpoints": {
        "llm_d.epp.filter.candidate_endpoints": "candidates",
        "llm_d.epp.filter.filtered_endpoints": "left",
    },
    "llm_d.epp.scoring": {"llm_d.epp.scoring.candidate_endpoints": "candidates"},
    "llm_d.epp.scorer.*": {
        "llm_d.epp.scorer.weight": "weight",
        "llmtrace.scorer.scores": "scores",
        "llm_d.epp.scorer.score.max": "max",
        "llmtrace.prefix.match_tokens": "match tokens",
        "llmtrace.prefix.prompt_tokens": "of",
    },
    "pick_endpoints": {"llm_d.epp.picker.top_scores": "top"},
    "pick_disagg_profile": {"llm_d.epp.profile_handler.decision": "step"},
    "prepare_disaggregation": {
        "llmtrace.pd.decision": "decision",
        "llm_d.epp.pd.disaggregation_used": "split",
        "llmtrace.pd.reason": "reason",
        "llmtrace.pd.prompt_tokens": "prompt",
        "llmtrace.pd.cached_tokens": "cached",
        "llmtrace.pd.threshold_tokens": "threshold",
        "llmtrace.pd.minimum_prompt_tokens": "minimum",
        "llmtrace.pd.decode_endpoint": "decode",
        "llmtrace.pd.decode_waiting": "waiting",
        "llmtrace.pd.prefill_endpoint": "prefill",
        "llmtrace.pd.prefill_waiting": "waiting",
    },
    "llm_d.pd_proxy.POST *": {"http.response.status_code": "status"},
    "forward_request": {
        "llm_d.pd_proxy.disaggregation_used": "split",
        "llm_d.pd_proxy.prefill_target": "prefill at",
        "llm_d.pd_proxy.reason": "reason",
    },
    "HTTP *": {"url.full": "to", "http.response.status_code": "status"},
    "llm_request": {
        "gen_ai.usage.prompt_tokens": "prompt",
        "gen_ai.usage.completion_tokens": "output",
        "gen_ai.latency.time_in_queue": "queue",
        "gen_ai.latency.time_in_model_prefill": "prefill",
        "gen_ai.latency.time_in_model_decode": "decode",
        "gen_ai.latency.time_to_first_token": "ttft",
    },
    "queue": {
        "llmtrace.queue.reason": "reason",
        "llmtrace.queue.position": "position",
        "llmtrace.queue.running": "running",
        "llmtrace.queue.waiting": "waiting",
    },
    "kv_load": {
        "llmtrace.kv_load.bytes": "size",
        "llmtrace.kv_load.blocks": "blocks",
        "llmtrace.kv_load.tokens": "tokens",
        "llmtrace.kv_load.transfer_ms": "transfer ms",
        "llmtrace.kv_load.remote_engine_id": "from engine",
        "llmtrace.kv_load.failed": "failed",
    },
    # The sidecar's legs and the model server's phases have the same names.
    "prefill": {
        "llm_d.pd_proxy.prefill_target": "to",
        "llm_d.pd_proxy.prefill.status_code": "status",
        "gen_ai.usage.input_tokens": "prompt",
        "llmtrace.prefill.local_cached_tokens": "cached",
        "llmtrace.prefill.external_cached_tokens": "loaded",
        "llmtrace.prefill.computed_tokens": "computed",
        "llmtrace.prefill.chunks": "chunks",
    },
    "decode": {
        "llm_d.pd_proxy.decode.target": "to",
        "gen_ai.usage.output_tokens": "output",
        "llmtrace.decode.tpot_mean_ms": "tpot ms",
        "llmtrace.decode.gap_max_ms": "longest gap ms",
        "llmtrace.preempted_ms": "preempted ms",
    },
    "llmtrace.flow_control.queue": {
        "llmtrace.flow_control.outcome": "outcome",
        "llmtrace.flow_control.queue_size": "waiting",
        "llmtrace.flow_control.saturation": "saturation",
    },
    "autoscale.decision": {
        "llmtrace.autoscale.direction": "direction",
        "llmtrace.autoscale.reason": "reason",
        "llmtrace.autoscale.metric.value": "value",
        "llmtrace.autoscale.metric.target": "target",
        "llmtrace.autoscale.replicas.current": "replicas",
        "llmtrace.autoscale.replicas.recommended": "recommended",
        "llmtrace.autoscale.replicas.desired": "desired",
        "llmtrace.autoscale.limit": "limit",
        "llmtrace.autoscale.drivers.found": "drivers",
        "llmtrace.autoscale.drivers.linked": "linked",
        "llmtrace.autoscale.drivers.unread": "unread",
        "llmtrace.autoscale.failure": "failure",
    },
    "autoscale.replica": {"llmtrace.autoscale.replica": "replica", "llmtrace.autoscale.outcome": "outcome"},
    "drain": {
        "llmtrace.autoscale.drain.running": "running",
        "llmtrace.autoscale.drain.cut": "cut",
        "llmtrace.autoscale.drain.moved": "moved",
    },
    **{
        name: {"llmtrace.autoscale.source": "by"}
        for name in ("container.start", "model.load", "ready", "first_request")
    },
}
"""The attributes that matter and their labels, by span name (a shell-style pattern). Others: the first."""

PER_ENDPOINT = {
    "llmtrace.scorer.scores": "llmtrace.scorer.endpoints",
    "llmtrace.prefix.match_tokens": "llmtrace.scorer.endpoints",
    "llm_d.epp.picker.top_scores": "llm_d.epp.picker.top_endpoints",
}
"""Arrays with an element for each endpoint, and the array that names the endpoints."""

MOST_OTHERS = 6
MOST_LINKS = 4
"""Of a span that are shown; --json has them all."""
NAME_WIDTH = 52
"""Longer names, indentation included, are cut."""
SECONDS = "gen_ai.latency."
BYTES = "llmtrace.kv_load.bytes"


def tree(trace: Trace, *, bar_width: int = 16) -> RenderableType:
    """The trace as a table: spans indented under their parents, start, duration, bar, attributes."""
    start = min((s.start_ns for s in trace.spans), default=0)
    end = max((s.end_ns for s in trace.spans), default=0)
    colours = _colours(trace)
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1), expand=False)
    table.add_column("span", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("start ms", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("time", no_wrap=True, min_width=bar_width)
    table.add_column("attributes", overflow="fold", ratio=4)
    orphans = {id(s) for s in trace.orphans}
    for depth, span in trace.walk():
        colour = colours[_sender(span)]
        name = Text(" " * depth + span.name, style="bold red" if span.status == "ERROR" else "")
        name.truncate(NAME_WIDTH, overflow="ellipsis")
        if id(span) in orphans:
            name.append(f"  orphan: parent {span.parent_id} is not in the trace", style="bold red")
        table.add_row(
            name,
            Text(_sender(span), style=colour),
            f"{(span.start_ns - start) / 1e6:.1f}",
            f"{span.duration_ms:.1f}",
            Text(bar(span, start, end, bar_width), style=colour),
            _details(span, start),
        )
    senders = len({_sender(s) for s in trace.spans})
    head = Text.assemble(
        "trace ",
        (trace.trace_id, "bold"),
        f"  {len(trace.spans)} spans, {senders} senders, {(end - start) / 1e6:.1f} ms",
        *([(f", {len(orphans)} orphans", "bold red")] if orphans else []),
        *([(f", {len(trace.duplicates)} duplicates", "bold red")] if trace.duplicates else []),
    )
    return Group(head, table)


def bar(span: Span, start_ns: int, end_ns: int, width: int) -> str:
    """The span's place in the trace as a bar of ``width`` characters, at least one of them filled."""
    total = max(end_ns - start_ns, 1)
    left = min(int((span.start_ns - start_ns) / total * width), width - 1)
    length = max(1, min(round((span.end_ns - span.start_ns) / total * width), width - left))
    return " " * left + "━" * length + " " * (width - left - length)


def _sender(span: Span) -> str:
    service = span.service or "unknown"
    return f"{service}/{span.instance}" if span.instance else service


def _colours(trace: Trace) -> dict[str, str]:
    senders = dict.fromkeys(_sender(s) for s in trace.spans)
    return {sender: COLOURS[n % len(COLOURS)] for n, sender in enumerate(senders)}


def shown_attributes(span: Span) -> Iterator[tuple[str, str]]:
    """Labels and values of the attributes that matter."""
    for pattern, labels in SHOWN.items():
        if fnmatchcase(span.name, pattern):
            yield from ((labels[n], _value(span, n)) for n in labels if span.attributes.get(n) is not None)
            return
    others = [n for n in span.attributes if n not in HIDDEN]
    yield from ((n, _value(span, n)) for n in others[:MOST_OTHERS])


def _details(span: Span, start_ns: int) -> Text:
    details = Text("  ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in shown_attributes(span))
    if span.status == "ERROR":
        details.append(f"  error: {span.status_message or 'no message'}", style="bold red")
    for event in span.events:
        details.append(f"  event {event.name} at {(event.time_ns - start_ns) / 1e6:.1f} ms", style="italic")
    for link in span.links[:MOST_LINKS]:
        details.append(f"  link to {link.trace_id}:{link.span_id}", style="italic")
    if len(span.links) > MOST_LINKS:
        details.append(f"  and {len(span.links) - MOST_LINKS} more links", style="italic")
    return details


def _value(span: Span, name: str) -> str:
    value, endpoints = span.attributes[name], span.attributes.get(PER_ENDPOINT.get(name, ""))
    if isinstance(endpoints, list | tuple) and isinstance(value, list | tuple):
        short = [str(e).rpartition("/")[2] for e in endpoints]
        return " ".join(f"{e}={format_value('', v)}" for e, v in zip(short, value, strict=False))
    return format_value(name, value)


def format_value(name: str, value: AttributeValue) -> str:
    """A value for people: floats rounded, vLLM's latencies in seconds as milliseconds, bytes as MB, arrays joined."""
    if name.startswith(SECONDS) and isinstance(value, int | float):
        return f"{value * 1e3:.1f} ms"
    if name == BYTES and isinstance(value, int):
        return bytes_text(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(format_value("", v) for v in value)
    return str(value)
