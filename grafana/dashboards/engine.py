"""Inside the model servers: queue, KV load, prefill, decode, the batch and the KV cache."""

from __future__ import annotations

from grafana.board import COMPARED, FLOW, YOURS, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import DURATION, SERVER, TPOT, TTFT, VLLM, gauge, mean, quantile, rate

SPLIT = "pd-disaggregation"


def phase(name: str) -> str:
    """The selector of one of the engine's phases."""
    return f'service_name="vllm",span_name="{name}",{SERVER}'


def phase_panel(title: str, description: str, name: str, warn: float, bad: float, scenario: str = "") -> Panel:
    """Quantiles of a phase's duration by endpoint."""
    return Panel(
        title,
        f"{description} An exemplar leads to the trace.",
        "s",
        (
            Query(
                quantile(0.5, DURATION, phase(name), "service_instance_id"),
                "p50 {{service_instance_id}}",
            ),
            Query(
                quantile(0.95, DURATION, phase(name), "service_instance_id"),
                "p95 {{service_instance_id}}",
                exemplars=True,
            ),
        ),
        thresholds=limits(warn, bad),
        width=6,
        scenario=scenario,
        endpoint_label="service_instance_id",
    )


PHASES = Row(
    "Phases of a request",
    (
        phase_panel("Queue", "Waiting for a place in the batch.", "queue", 0.5, 2),
        phase_panel("KV load", "A connector brings KV from elsewhere.", "kv_load", 0.2, 1, SPLIT),
        phase_panel("Prefill", "From the first scheduling to the first token.", "prefill", 1, 2),
        phase_panel("Decode", "From the first token to the last.", "decode", 10, 30),
        Panel(
            "Time per phase",
            "Seconds of requests per second: how many requests are in each phase at once, in the mean, by role.",
            "short",
            (
                Query(
                    rate(
                        f"{DURATION}_sum",
                        f'service_name="vllm",span_name=~"queue|kv_load|prefill|decode",{SERVER}',
                        "span_name, llmtrace_role",
                    ),
                    "{{span_name}} {{llmtrace_role}}",
                ),
            ),
            no_limit=COMPARED,
            stacked=True,
        ),
        Panel(
            "TTFT and TPOT",
            "Means by endpoint: from a request's arrival to its first token, and per token after it.",
            "s",
            (
                Query(mean(TTFT, SERVER, "service_instance_id"), "TTFT {{service_instance_id}}"),
                Query(mean(TPOT, SERVER, "service_instance_id"), "TPOT {{service_instance_id}}"),
            ),
            thresholds=limits(1, 2),
            endpoint_label="service_instance_id",
        ),
    ),
)

BATCH = Row(
    "Batch and queue",
    (
        Panel(
            "Running requests",
            "Requests in the batch.",
            "short",
            (Query(gauge("vllm:num_requests_running", VLLM, "instance"), "{{instance}}"),),
            no_limit=YOURS,
            width=8,
        ),
        Panel(
            "Waiting requests",
            "Requests without a place in the batch, those that wait for KV included.",
            "short",
            (Query(gauge("vllm:num_requests_waiting", VLLM, "instance"), "{{instance}}"),),
            thresholds=limits(5, 20),
            width=8,
        ),
        Panel(
            "Tokens per engine step",
            "Mean number of tokens, of prompts and generated, that one step of the engine works on.",
            "short",
            (Query(mean("vllm:iteration_tokens_total", VLLM, "instance"), "{{instance}}"),),
            no_limit=YOURS,
            width=8,
        ),
        Panel(
            "Prompt tokens by source",
            "Prompt tokens per second that were computed here, found in the local cache, or brought from another "
            "server.",
            "short",
            (Query(rate("vllm:prompt_tokens_by_source_total", VLLM, "source"), "{{source}}"),),
            no_limit=FLOW,
            stacked=True,
            width=8,
        ),
        Panel(
            "Generated tokens",
            "Tokens generated per second.",
            "short",
            (Query(rate("vllm:generation_tokens_total", VLLM, "instance"), "{{instance}}"),),
            no_limit=FLOW,
            width=8,
        ),
        Panel(
            "Why requests ended",
            "Requests per second by finish reason: the end of the answer, its length limit, the client's hang-up, an "
            "error.",
            "reqps",
            (Query(rate("vllm:request_success_total", VLLM, "finished_reason"), "{{finished_reason}}"),),
            no_limit=COMPARED,
            width=8,
        ),
    ),
)

CACHE = Row(
    "KV cache",
    (
        Panel(
            "KV cache in use",
            "Share of the blocks that running requests hold.",
            "percentunit",
            (Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{VLLM}}})", "{{instance}}"),),
            thresholds=limits(0.8, 0.95),
            maximum=1,
            width=8,
        ),
        Panel(
            "Preemptions",
            "Requests per second that lost their place in the batch since the KV cache was full; they begin again "
            "later.",
            "ops",
            (Query(rate("vllm:num_preemptions_total", VLLM, "instance"), "{{instance}}"),),
            thresholds=limits(0.1, 1),
            width=8,
        ),
        Panel(
            "Loads of KV under way",
            "Waiting requests by how far their load of KV from another server is.",
            "short",
            (Query(gauge("vllm:num_requests_kv_fetch_by_stage", VLLM, "stage"), "{{stage}}"),),
            thresholds=limits(5, 20),
            width=8,
            scenario=SPLIT,
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Long in the queue",
            "Requests that waited more than 200 ms for a place in the batch.",
            '{ resource.service.name = "vllm" && name = "queue" && duration > 200ms '
            '&& resource.service.instance.id =~ "$endpoint" }',
            width=8,
        ),
        TraceTable(
            "Slow prefill",
            "Requests whose prefill took more than half a second.",
            '{ resource.service.name = "vllm" && name = "prefill" && duration > 500ms '
            '&& resource.service.instance.id =~ "$endpoint" }',
            width=8,
        ),
        TraceTable(
            "Preempted",
            "Requests that lost their place in the batch.",
            '{ resource.service.name = "vllm" && name = "llm_request" && span.llmtrace.preemptions > 0 '
            '&& resource.service.instance.id =~ "$endpoint" }',
            width=8,
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Long in the queue (Jaeger)",
            "The same in Jaeger.",
            service="vllm",
            operation="queue",
            min_duration="200ms",
        ),
        JaegerTable(
            "Slow prefill (Jaeger)",
            "The same in Jaeger.",
            service="vllm",
            operation="prefill",
            min_duration="500ms",
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-engine",
    "LLM inference: engine",
    "Where the time goes inside the model servers, and what holds it up: queue, batch, KV cache.",
    (PHASES, BATCH, CACHE, TRACES, JAEGER),
    scenarios=("prefix-cache", "pd-disaggregation"),
)
