"""Prefill/decode disaggregation: which requests are split, why, and what the KV transfer costs."""

from __future__ import annotations

from grafana.board import COMPARED, FLOW, YOURS, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import (
    CALLS,
    DURATION,
    REQUEST,
    SERVER,
    TTFT,
    VLLM,
    gauge,
    mean,
    or_zero,
    per,
    quantile,
    rate,
)

DECISIONS = f'span_name="prepare_disaggregation",{REQUEST}'
SIDECAR = f'service_name="llm-d-disagg-sidecar",{REQUEST}'
LOAD = f'service_name="vllm",span_name="kv_load",{SERVER}'
FAILED, EXPIRED = "vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_kv_expired_reqs_total"

DECISION = Row(
    "Decisions",
    (
        Panel(
            "Split",
            "Share of the requests that a prefill server and a decode server serve together.",
            "percentunit",
            (
                Query(
                    per(or_zero(rate(CALLS, f'llmtrace_pd_decision="split",{DECISIONS}')), rate(CALLS, DECISIONS)),
                    "split",
                ),
            ),
            kind="stat",
            no_limit=YOURS,
            maximum=1,
            width=4,
        ),
        Panel(
            "Decisions by reason",
            "Requests per second by the picker's decision and its reason: the prompt, less what the decode server has "
            "cached, is long enough to be split, or why not.",
            "reqps",
            (
                Query(
                    rate(CALLS, DECISIONS, "llmtrace_pd_decision, llmtrace_pd_reason"),
                    "{{llmtrace_pd_decision}}: {{llmtrace_pd_reason}}",
                    exemplars=True,
                ),
            ),
            no_limit=COMPARED,
            stacked=True,
            width=10,
        ),
        Panel(
            "Stages by picker",
            "Requests per second by the stages that each picker split them into, by llm-d's own metric.",
            "reqps",
            (
                Query(
                    rate("llm_d_epp_disagg_decision_total", 'namespace=~"$namespace"', "instance, decision_type"),
                    "{{instance}}: {{decision_type}}",
                ),
            ),
            no_limit=COMPARED,
            width=10,
        ),
    ),
)

TRANSFER = Row(
    "KV transfer",
    (
        Panel(
            "Transfer time",
            "NIXL's own time for one transfer, and the time that requests wait for their KV, which includes the queue "
            "before it. An exemplar leads to the trace.",
            "s",
            (
                Query(quantile(0.5, "vllm:nixl_xfer_time_seconds", VLLM), "transfer p50"),
                Query(quantile(0.95, "vllm:nixl_xfer_time_seconds", VLLM), "transfer p95"),
                Query(quantile(0.5, DURATION, LOAD), "wait p50"),
                Query(quantile(0.95, DURATION, LOAD), "wait p95", exemplars=True),
            ),
            thresholds=limits(0.2, 1),
            width=8,
        ),
        Panel(
            "Bytes",
            "Bytes per second that decode servers fetch from prefill servers.",
            "binBps",
            (Query(rate("vllm:nixl_bytes_transferred_sum", VLLM, "instance"), "{{instance}}"),),
            no_limit=FLOW,
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "Bytes per transfer",
            "Mean size of a transfer.",
            "bytes",
            (Query(mean("vllm:nixl_bytes_transferred", VLLM, "instance"), "{{instance}}"),),
            no_limit=FLOW,
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "Waiting for KV, share of TTFT",
            "Time that the decode servers' requests wait for KV, of their time to the first token.",
            "percentunit",
            (
                Query(
                    per(
                        rate(f"{DURATION}_sum", LOAD, "service_instance_id"),
                        rate(f"{TTFT}_sum", f'llmtrace_role!="prefill",{SERVER}', "service_instance_id"),
                    ),
                    "{{service_instance_id}}",
                ),
            ),
            thresholds=limits(0.3, 0.6),
            maximum=1,
            width=8,
            endpoint_label="service_instance_id",
        ),
        Panel(
            "Failed transfers",
            "Transfers per second that failed, at the decode server, and requests whose KV nobody fetched in time, at "
            "the prefill server. Anything above 0 wants an explanation.",
            "ops",
            (
                Query(rate(FAILED, VLLM, "instance"), "failed {{instance}}"),
                Query(rate(EXPIRED, VLLM, "instance"), "expired {{instance}}"),
            ),
            thresholds=limits(0.001, 0.1),
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "Loads under way",
            "Waiting requests by how far their load of KV is.",
            "short",
            (Query(gauge("vllm:num_requests_kv_fetch_by_stage", VLLM, "stage"), "{{stage}}"),),
            thresholds=limits(5, 20),
            width=8,
        ),
    ),
)

LEGS = Row(
    "Both legs",
    (
        Panel(
            "Legs at the sidecar",
            "How long the sidecars wait for each leg of a split request: prefill until its answer, decode until its "
            "last token. An exemplar leads to the trace.",
            "s",
            tuple(
                Query(
                    quantile(share, DURATION, f'span_name=~"prefill|decode",{SIDECAR}', "span_name"),
                    f"p{share * 100:g} {{{{span_name}}}}",
                    exemplars=share == 0.95,
                )
                for share in (0.5, 0.95)
            ),
            thresholds=limits(10, 30),
            width=8,
        ),
        Panel(
            "TTFT in the model servers by role",
            "From the arrival at a prefill server, or at a decode server, to the first token there. A split request "
            "passes both, one after the other.",
            "s",
            tuple(
                Query(quantile(share, TTFT, SERVER, "llmtrace_role"), f"p{share * 100:g} {{{{llmtrace_role}}}}")
                for share in (0.5, 0.95)
            ),
            thresholds=limits(1, 2),
            width=8,
        ),
        Panel(
            "Phases by role",
            "Mean duration of the engine's phases in each kind of server.",
            "s",
            (
                Query(
                    mean(
                        DURATION,
                        f'service_name="vllm",span_name=~"queue|kv_load|prefill|decode",{SERVER}',
                        "llmtrace_role, span_name",
                    ),
                    "{{llmtrace_role}} {{span_name}}",
                ),
            ),
            no_limit=COMPARED,
            width=8,
        ),
        Panel(
            "Waiting requests by role",
            "Requests that wait for a place in the batch. Where they wait, servers of that role are missing.",
            "short",
            (Query(gauge("vllm:num_requests_waiting", VLLM, "role"), "{{role}}"),),
            thresholds=limits(5, 20),
        ),
        Panel(
            "Prompt tokens by source and role",
            "Prompt tokens per second that were computed, found in the local cache, or brought from a prefill server.",
            "short",
            (Query(rate("vllm:prompt_tokens_by_source_total", VLLM, "role, source"), "{{role}} {{source}}"),),
            no_limit=COMPARED,
            stacked=True,
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Split requests",
            "The newest requests that were split. The span has the numbers behind the decision.",
            '{ name = "prepare_disaggregation" && span.llmtrace.pd.decision = "split" }',
            width=8,
        ),
        TraceTable(
            "Slow transfers",
            "Requests that waited more than 100 ms for their KV.",
            '{ resource.service.name = "vllm" && name = "kv_load" && duration > 100ms '
            '&& resource.service.instance.id =~ "$endpoint" }',
            width=8,
        ),
        TraceTable(
            "Requests without their KV",
            "Requests whose KV did not come.",
            '{ resource.service.name = "vllm" && name = "kv_load" && span.llmtrace.kv_load.failed = true }',
            width=8,
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Split requests (Jaeger)",
            "The same in Jaeger.",
            service="llm-d-epp",
            operation="prepare_disaggregation",
            tags="llmtrace.pd.decision=split",
        ),
        JaegerTable(
            "Slow transfers (Jaeger)",
            "The same in Jaeger.",
            service="vllm",
            operation="kv_load",
            min_duration="100ms",
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-pd-disaggregation",
    "LLM inference: P/D disaggregation",
    "Which requests are split into prefill and decode servers and why, what the KV transfer costs, and how long both "
    "legs take.",
    (DECISION, TRANSFER, LEGS, TRACES, JAEGER),
    scenarios=("pd-disaggregation",),
)
