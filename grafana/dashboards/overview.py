"""The golden signals, from the request at the gateway to the engine."""

from __future__ import annotations

from grafana.board import COMPARED, FLOW, YOURS, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import (
    CALLS,
    DURATION,
    ENVOY,
    ERROR,
    PICKER,
    REQUEST,
    SERVER,
    TPOT,
    TTFT,
    VLLM,
    gauge,
    or_zero,
    per,
    quantile,
    rate,
)

GATEWAY = f'span_name="gateway.request",{REQUEST}'
PHASES = 'span_name=~"gateway.request_orchestration|queue|kv_load|prefill|decode",service_name=~"llm-d-epp|vllm"'
PICKER_TTFT = "llm_d_epp_request_ttft_seconds"
NO_FAILURE = "no request fails on a healthy stack"

NOW = Row(
    "Now",
    (
        Panel(
            "Requests",
            "Requests per second that reach the endpoint picker.",
            "reqps",
            (Query(rate(CALLS, GATEWAY), "requests"),),
            kind="stat",
            no_limit=FLOW,
            width=4,
            height=4,
        ),
        Panel(
            "Failed",
            "Share of the requests at the picker that end with an error.",
            "percentunit",
            (Query(per(or_zero(rate(CALLS, f"{ERROR},{GATEWAY}")), rate(CALLS, GATEWAY)), "failed"),),
            kind="stat",
            thresholds=limits(0.01, 0.05),
            width=4,
            height=4,
        ),
        Panel(
            "TTFT, 95 %",
            "Time from a request to the first part of its response, as the picker sees it: 95 % of requests are "
            "faster.",
            "s",
            (Query(quantile(0.95, PICKER_TTFT, PICKER), "p95"),),
            kind="stat",
            thresholds=limits(1, 2),
            width=4,
            height=4,
        ),
        Panel(
            "TPOT, 95 %",
            "Time per output token after the first, of streamed responses: 95 % of requests are faster.",
            "s",
            (Query(quantile(0.95, "llm_d_epp_request_streaming_tpot_seconds", PICKER), "p95"),),
            kind="stat",
            thresholds=limits(0.1, 0.2),
            width=4,
            height=4,
        ),
        Panel(
            "Waiting",
            "Requests that wait for a place in a batch, over all model servers.",
            "short",
            (Query(gauge("vllm:num_requests_waiting", VLLM), "waiting"),),
            kind="stat",
            thresholds=limits(5, 20),
            width=4,
            height=4,
        ),
        Panel(
            "Ready endpoints",
            "Model servers that the picker chooses from; the lowest number of all pickers and pools.",
            "short",
            (Query('min(llm_d_epp_ready_endpoints{namespace=~"$namespace"})', "ready"),),
            kind="stat",
            thresholds=limits(2, 1),
            width=4,
            height=4,
        ),
    ),
)

TRAFFIC = Row(
    "Traffic and errors",
    (
        Panel(
            "Responses of the gateway",
            "Envoy's responses per second by the first digit of their status code.",
            "reqps",
            (
                Query(
                    rate("envoy_http_downstream_rq_xx", ENVOY, "envoy_response_code_class"),
                    "{{envoy_response_code_class}}xx",
                ),
            ),
            no_limit=COMPARED,
            width=8,
        ),
        Panel(
            "Tokens",
            "Prompt tokens whose prefill ended, those from caches included, and tokens generated, per second.",
            "short",
            (
                Query(rate("vllm:prompt_tokens_total", VLLM), "prompt"),
                Query(rate("vllm:generation_tokens_total", VLLM), "generated"),
            ),
            no_limit=FLOW,
            width=8,
        ),
        Panel(
            "Spans with an error",
            "Spans per second that ended with an error, by who sent them and by the class of the error. An exemplar "
            "leads to the trace.",
            "ops",
            (
                Query(
                    rate(CALLS, f"{ERROR},{REQUEST}", "service_name, error_type"),
                    "{{service_name}} {{error_type}}",
                    exemplars=True,
                    may_be_empty=NO_FAILURE,
                ),
            ),
            thresholds=limits(0.1, 1),
            width=8,
        ),
    ),
)

LATENCIES = Row(
    "Latency",
    (
        Panel(
            "Request duration at the picker",
            "From a request's headers to the end of its response. An exemplar leads to the trace.",
            "s",
            tuple(
                Query(quantile(share, DURATION, GATEWAY), f"p{share * 100:g}", exemplars=share == 0.99)
                for share in (0.5, 0.95, 0.99)
            ),
            thresholds=limits(10, 30),
            width=8,
        ),
        Panel(
            "TTFT at the picker",
            "From a request's headers to the first part of its response, the whole prefill of a split request "
            "included.",
            "s",
            tuple(Query(quantile(share, PICKER_TTFT, PICKER), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
            thresholds=limits(1, 2),
            width=8,
        ),
        Panel(
            "TPOT in the model servers",
            "Mean time per output token after the first, by role. An exemplar leads to the trace.",
            "s",
            (Query(quantile(0.95, TPOT, SERVER, "llmtrace_role"), "p95 {{llmtrace_role}}", exemplars=True),),
            thresholds=limits(0.1, 0.2),
            width=8,
        ),
        Panel(
            "TTFT in the model servers",
            "From a request's arrival at the model server to its first token, by endpoint. An exemplar leads to the "
            "trace.",
            "s",
            (
                Query(
                    quantile(0.95, TTFT, SERVER, "service_instance_id"),
                    "p95 {{service_instance_id}}",
                    exemplars=True,
                ),
            ),
            thresholds=limits(1, 2),
            endpoint_label="service_instance_id",
        ),
        Panel(
            "Where a request's time goes",
            "Seconds per request at the picker: choosing an endpoint, waiting for a place in the batch, loading KV, "
            "prefill, decode. Means, summed over all model servers that a request passes.",
            "s",
            (
                Query(
                    f"{rate(f'{DURATION}_sum', f'{PHASES},{REQUEST}', 'span_name')} / on () group_left () "
                    f"({rate(f'{DURATION}_count', GATEWAY)} > 0)",
                    "{{span_name}}",
                ),
            ),
            thresholds=limits(10, 30),
            stacked=True,
        ),
    ),
)

SATURATION = Row(
    "Saturation",
    (
        Panel(
            "Running requests",
            "Requests in the batch of each model server.",
            "short",
            (Query(gauge("vllm:num_requests_running", VLLM, "instance"), "{{instance}}"),),
            no_limit=YOURS,
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "Waiting requests",
            "Requests that wait for a place in the batch of each model server.",
            "short",
            (Query(gauge("vllm:num_requests_waiting", VLLM, "instance"), "{{instance}}"),),
            thresholds=limits(5, 20),
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "KV cache in use",
            "Share of the blocks of each model server's KV cache that running requests hold. Near 1 requests are "
            "preempted.",
            "percentunit",
            (Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{VLLM}}})", "{{instance}}"),),
            thresholds=limits(0.8, 0.95),
            maximum=1,
            width=8,
            endpoint_label="instance",
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Slow requests",
            "Requests whose first token took the model server more than a second.",
            '{ resource.service.name = "vllm" && name = "llm_request" && span.gen_ai.latency.time_to_first_token > 1 '
            '&& resource.service.instance.id =~ "$endpoint" }',
        ),
        TraceTable(
            "Failed requests",
            "Requests with an error at the gateway, the picker, the sidecar or the model server.",
            '{ status = error && resource.service.name =~ "envoy|llm-d-epp|llm-d-disagg-sidecar|vllm" }',
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Slow requests (Jaeger)",
            "The same in Jaeger: requests that took the model server more than 2 s in all.",
            service="vllm",
            operation="llm_request",
            min_duration="2s",
        ),
        JaegerTable(
            "Failed requests (Jaeger)",
            "The same in Jaeger: requests with an error at the picker.",
            service="llm-d-epp",
            operation="gateway.request",
            tags="error=true",
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-overview",
    "LLM inference: overview",
    "Traffic, errors, latency and saturation of LLM inference on llm-d, from the gateway to the engine.",
    (NOW, TRAFFIC, LATENCIES, SATURATION, TRACES, JAEGER),
    scenarios=("prefix-cache", "pd-disaggregation"),
)
