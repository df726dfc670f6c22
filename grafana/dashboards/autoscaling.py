"""Autoscaling: what is asked for, what was decided, when it was of use, and what waiting cost meanwhile."""

from __future__ import annotations

from grafana.board import COMPARED, FLOW, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import DURATION, PICKER, REQUEST, VLLM, gauge, grown, or_zero, quantile, rate

POOL = 'namespace=~"$namespace"'
WAITING = "llm_d_epp_flow_control_queue_size"
LEFT = "llm_d_epp_flow_control_requests_total"
WAITED = "llm_d_epp_flow_control_request_queue_duration_seconds"
STARTING = f'service_name="llmtrace-autoscale",span_name=~"container.start|model.load|ready|first_request",{REQUEST}'
SCALER = "of the kit's scaler, or of its watcher of a cluster's scalers"
RANGE = "it grows with the range that is looked at"
SERVERS = f"count by (role) (vllm:num_requests_running{{{VLLM}}})"


DEMAND = Row(
    "Demand",
    (
        Panel(
            "Waiting at the gateway",
            "Requests in the picker's flow control by the model that they name. A scaler that follows llm-d's guide "
            "takes this for its first metric.",
            "short",
            (Query(gauge(WAITING, PICKER, "model_name"), "{{model_name}}"),),
            thresholds=limits(1, 20),
            stacked=True,
        ),
        Panel(
            "Running",
            "Requests that passed flow control and whose response has not ended, by model.",
            "short",
            (Query(gauge("llm_d_epp_request_running", PICKER, "model_name"), "{{model_name}}"),),
            no_limit=FLOW,
            stacked=True,
        ),
        Panel(
            "Saturation of the pool",
            "From 1 on requests wait in flow control. Endpoints without recent metrics count as saturated.",
            "percentunit",
            (
                Query(
                    f'max by (inference_pool) (llm_d_epp_flow_control_pool_saturation{{stage="effective",{POOL}}})',
                    "{{inference_pool}}",
                ),
            ),
            thresholds=limits(0.8, 1),
        ),
        Panel(
            "How waiting ended",
            "Requests per second that left flow control, by outcome. All but Dispatched are refused.",
            "reqps",
            (Query(rate(LEFT, POOL, "outcome"), "{{outcome}}"),),
            no_limit=COMPARED,
            stacked=True,
            width=6,
        ),
        Panel(
            "Refused",
            "Requests per second that flow control did not let pass: no room to wait, or too long a wait.",
            "reqps",
            (Query(or_zero(rate(LEFT, f'outcome!="Dispatched",{POOL}')), "refused"),),
            thresholds=limits(0.01, 0.1),
            width=6,
        ),
    ),
)

DECISIONS = Row(
    "Decisions",
    (
        Panel(
            "Replicas",
            "Replicas that the scaler asks for, those of them that are ready, and the endpoints that the picker "
            "knows. The gap between the first two is what is under way, or stuck. In a cluster by workload.",
            "short",
            (
                Query(
                    f"max by (workload) (llmtrace_autoscale_current_replicas{{{POOL}}})",
                    "asked for {{workload}}",
                    may_be_empty=SCALER,
                ),
                Query(
                    f"max by (workload) (llmtrace_autoscale_ready_replicas{{{POOL}}})",
                    "ready {{workload}}",
                    may_be_empty=SCALER,
                ),
                Query(f"min(llm_d_epp_ready_endpoints{{{POOL}}})", "endpoints of the picker"),
            ),
            no_limit=COMPARED,
        ),
        Panel(
            "Decisions by direction",
            "Scaling decisions in the last five minutes by direction; a hold says that what holds the number back is "
            "no longer what it was. The table below leads to the trace of each, with its numbers and the requests "
            "behind it.",
            "short",
            (
                Query(
                    grown("llmtrace_autoscale_decisions_total", POOL, "direction", "5m"),
                    "{{direction}}",
                    may_be_empty=SCALER,
                ),
            ),
            thresholds=limits(5, 10),
            width=6,
        ),
        Panel(
            "What the scaler could not reach",
            "Failures in the last five minutes of Prometheus, supervisord or the store, as the scaler saw them.",
            "short",
            (
                Query(
                    grown("llmtrace_autoscale_failures_total", POOL, "part", "5m"),
                    "{{part}}",
                    may_be_empty=SCALER,
                ),
            ),
            thresholds=limits(1, 5),
            width=6,
        ),
    ),
)

READINESS = Row(
    "Readiness",
    (
        Panel(
            "What a new replica's time goes into",
            "Mean seconds from the order to start a replica to its first token, by phase, of all that were started "
            "since the Collector's series began. The trace of each decision has the phases of each replica.",
            "s",
            (
                Query(
                    f"sum by (span_name) ({DURATION}_sum{{{STARTING}}}) / "
                    f"sum by (span_name) ({DURATION}_count{{{STARTING}}})",
                    "{{span_name}}",
                    may_be_empty="there once a scaler that is traced has added a replica",
                ),
            ),
            thresholds=limits(300, 900),
            stacked=True,
        ),
        Panel(
            "Requests running by endpoint",
            "Requests in the batch of each model server: a new replica is of use from its first one on.",
            "short",
            (Query(gauge("vllm:num_requests_running", VLLM, "instance"), "{{instance}}"),),
            no_limit=COMPARED,
            endpoint_label="instance",
        ),
    ),
)

COST = Row(
    "What waiting cost",
    (
        Panel(
            "Waited in this range",
            "User-seconds: the time in flow control of all requests together.",
            "s",
            (Query(f"sum(sum_over_time(sum({WAITING}{{{PICKER}}})[$__range:5s])) * 5", "waited"),),
            kind="stat",
            no_limit=RANGE,
            width=6,
        ),
        Panel(
            "Accelerator-seconds in this range",
            "What the replicas that answered held in this time, at one accelerator each. The dashboard Cost has their "
            "price.",
            "s",
            (Query(f"sum(sum_over_time(({SERVERS})[$__range:5s])) * 5", "held"),),
            kind="stat",
            no_limit=RANGE,
            width=6,
        ),
        Panel(
            "Time in flow control",
            "How long requests waited there, those that need not wait included.",
            "s",
            tuple(Query(quantile(share, WAITED, PICKER), f"p{share * 100:g}") for share in (0.5, 0.95)),
            thresholds=limits(1, 5),
            width=6,
        ),
        Panel(
            "TTFT at the picker by model",
            "From a request's headers to the first part of its response, the wait included, 95 %.",
            "s",
            (Query(quantile(0.95, "llm_d_epp_request_ttft_seconds", PICKER, "model_name"), "{{model_name}}"),),
            thresholds=limits(1, 5),
            width=6,
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Decisions with their numbers",
            "The newest decisions. Each links to the requests that drove it, and has the replicas below it.",
            '{ resource.service.name = "llmtrace-autoscale" && name = "autoscale.decision" }',
            width=8,
        ),
        TraceTable(
            "Replicas that never served",
            "Replicas that were started and did not become ready, or for which no request came.",
            '{ name = "autoscale.replica" && span.llmtrace.autoscale.outcome =~ "failed|unused" }',
            width=8,
        ),
        TraceTable(
            "Long in flow control",
            "Requests that waited more than a second at the gateway.",
            '{ name = "llmtrace.flow_control.queue" && duration > 1s }',
            width=8,
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Decisions (Jaeger)",
            "The same in Jaeger.",
            service="llmtrace-autoscale",
            operation="autoscale.decision",
        ),
        JaegerTable(
            "Long in flow control (Jaeger)",
            "The same in Jaeger.",
            service="llm-d-epp",
            operation="llmtrace.flow_control.queue",
            min_duration="1s",
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-autoscaling",
    "LLM inference: autoscaling",
    "What was asked for, what the scaler decided, when new replicas were of use, and what waiting cost meanwhile.",
    (DEMAND, DECISIONS, READINESS, COST, TRACES, JAEGER),
    scenarios=("autoscaling",),
)
