"""The Collector: what it takes, what it passes on, and what is lost on the way."""

from __future__ import annotations

from grafana.board import COMPARED, FLOW, Board, Note, Panel, Query, Row, limits
from grafana.queries import CALLS, REQUEST, grown, rate

COLLECTOR = 'job=~".*collector.*",namespace=~"$namespace"'
NEVER_FAILED = "the Collector has this metric once it has happened"
GATEWAY_ONLY = "only gateways with tail sampling have it"
NO_OVERFLOW = "there once the limit of series is reached"

SPANS = Row(
    "Spans",
    (
        Panel(
            "Taken and sent",
            "Spans per second that came in, and that each exporter's backend took. With tail sampling fewer go out "
            "than come in.",
            "ops",
            (
                Query(rate("otelcol_receiver_accepted_spans_total", COLLECTOR, "instance"), "taken by {{instance}}"),
                Query(
                    rate("otelcol_exporter_sent_spans_total", COLLECTOR, "instance, exporter"),
                    "sent by {{instance}} to {{exporter}}",
                ),
            ),
            no_limit=COMPARED,
        ),
        Panel(
            "Refused",
            "Spans per second that the Collector refused, for lack of memory or of room in its queue. Senders try "
            "again; what they cannot hold is lost there.",
            "ops",
            (Query(rate("otelcol_receiver_refused_spans_total", COLLECTOR, "instance"), "{{instance}}"),),
            thresholds=limits(0.01, 10),
            width=6,
        ),
        Panel(
            "Given up",
            "Spans and metric points that an exporter gave up after a permanent error, or that found its queue full, "
            "counted over the rate interval. They are lost.",
            "short",
            tuple(
                Query(
                    grown(f"otelcol_exporter_{why}_failed_{what}_total", COLLECTOR, "exporter"),
                    f"{said} {{{{exporter}}}}: {what.replace('_', ' ')}",
                    may_be_empty=NEVER_FAILED,
                )
                for what in ("spans", "metric_points")
                for why, said in (("send", "not sent to"), ("enqueue", "no room in the queue of"))
            ),
            thresholds=limits(1, 100),
            width=6,
        ),
        Panel(
            "Queues of the exporters",
            "Share of each exporter's queue that is in use. It fills while a backend is slow or down; when it is "
            "full, spans are refused.",
            "percentunit",
            (
                Query(
                    f"max by (instance, exporter, data_type) (otelcol_exporter_queue_size{{{COLLECTOR}}} / "
                    f"otelcol_exporter_queue_capacity{{{COLLECTOR}}})",
                    "{{exporter}} {{data_type}} of {{instance}}",
                ),
            ),
            thresholds=limits(0.5, 0.8),
            maximum=1,
        ),
        Panel(
            "Dropped by the senders",
            "Before the Collector, in the last five minutes: requests and steps whose spans vLLM's plugin dropped "
            "since a queue was full, and spans that Envoy dropped.",
            "short",
            (
                Query(
                    f"sum by (service_instance_id) (increase(llmtrace_engine_dropped_requests_total{{{REQUEST}}}[5m]) "
                    f"or increase(llmtrace_step_dropped_total{{{REQUEST}}}[5m]))",
                    "requests and steps of {{service_instance_id}}",
                    may_be_empty="the plugin sends it once a minute from its first spans on, and not with tracing off",
                ),
                Query(
                    "sum by (instance) "
                    '(increase(envoy_tracing_opentelemetry_spans_dropped{namespace=~"$namespace"}[5m]))',
                    "spans of {{instance}}",
                ),
            ),
            thresholds=limits(1, 100),
        ),
    ),
)

METRICS = Row(
    "Metrics",
    (
        Panel(
            "Metric points",
            "Metric points per second that each exporter's backend took.",
            "ops",
            (
                Query(
                    rate("otelcol_exporter_sent_metric_points_total", COLLECTOR, "exporter"),
                    "sent to {{exporter}}",
                ),
            ),
            no_limit=FLOW,
            width=8,
        ),
        Panel(
            "Series of span metrics",
            "Series of one span metric, and whether any sender reached the limit: what is over it is counted together "
            "under the label otel_metric_overflow.",
            "short",
            (
                Query(f"count({CALLS}{{{REQUEST}}})", "series"),
                Query(
                    f'count({CALLS}{{otel_metric_overflow="true",{REQUEST}}})',
                    "senders over the limit",
                    may_be_empty=NO_OVERFLOW,
                ),
            ),
            thresholds=limits(5_000, 50_000),
            width=8,
        ),
        Panel(
            "Spans by sender",
            "Spans per second that were counted, by service: who is silent, who is loud.",
            "ops",
            (Query(rate(CALLS, REQUEST, "service_name"), "{{service_name}}"),),
            no_limit=COMPARED,
            width=8,
        ),
    ),
)

SAMPLING = Row(
    "Tail sampling",
    (
        Panel(
            "Decisions",
            "Traces per second that were kept, and that were not.",
            "ops",
            (
                Query(
                    rate("otelcol_processor_tail_sampling_global_count_traces_sampled_total", COLLECTOR, "sampled"),
                    "sampled: {{sampled}}",
                    may_be_empty=GATEWAY_ONLY,
                ),
            ),
            no_limit=COMPARED,
        ),
        Panel(
            "Traces that wait",
            "Traces that wait for their decision at each gateway. At TRACES_IN_MEMORY, 20,000 by default, the gateway "
            "takes no new ones until some are decided.",
            "short",
            (
                Query(
                    f"sum by (instance) (otelcol_processor_tail_sampling_sampling_traces_on_memory{{{COLLECTOR}}})",
                    "{{instance}}",
                    may_be_empty=GATEWAY_ONLY,
                ),
            ),
            thresholds=limits(10_000, 18_000),
            width=6,
        ),
        Panel(
            "Traces lost",
            "Traces that were dropped before their decision, or for their size, counted over the rate interval.",
            "short",
            (
                Query(
                    grown(
                        "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early_total", COLLECTOR, "instance"
                    ),
                    "dropped by {{instance}} too early",
                    may_be_empty=GATEWAY_ONLY,
                ),
                Query(
                    grown("otelcol_processor_tail_sampling_traces_dropped_too_large_total", COLLECTOR, "instance"),
                    "dropped by {{instance}}, too large",
                    may_be_empty=GATEWAY_ONLY,
                ),
            ),
            thresholds=limits(1, 100),
            width=6,
        ),
    ),
    collapsed=True,
)

PROCESS = Row(
    "Process",
    (
        Panel(
            "Memory",
            "Resident memory of each Collector. Its memory limiter refuses spans before the process is killed.",
            "bytes",
            (Query(f"max by (instance) (otelcol_process_memory_rss_bytes{{{COLLECTOR}}})", "{{instance}}"),),
            thresholds=limits(400 * 2**20, 800 * 2**20),
            width=8,
        ),
        Panel(
            "Processor",
            "Cores that each Collector uses.",
            "short",
            (Query(rate("otelcol_process_cpu_seconds_total", COLLECTOR, "instance"), "{{instance}}"),),
            thresholds=limits(1, 2),
            width=8,
        ),
        Panel(
            "Uptime",
            "Time since each Collector started. A fall is a restart.",
            "s",
            (Query(f"min by (instance) (otelcol_process_uptime_seconds_total{{{COLLECTOR}}})", "{{instance}}"),),
            thresholds=limits(600, 60),
            width=8,
        ),
        Note(
            "What a gap means",
            "Spans are lost for good only where **Given up** or **Dropped by the senders** rises. **Refused** spans "
            "come again as long as the sender holds them. While a backend is down, its queue fills on disk and "
            "empties afterwards: traces then arrive late, not never.",
            height=4,
        ),
    ),
)

BOARD = Board(
    "llmtrace-collector",
    "LLM inference: Collector",
    "Whether the OpenTelemetry Collectors pass on what they get, and where spans are lost if not.",
    (SPANS, METRICS, SAMPLING, PROCESS),
    scenarios=("prefix-cache", "pd-disaggregation"),
)
