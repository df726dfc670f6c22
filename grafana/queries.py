"""The parts that the dashboards' PromQL is made of.

Each selector has the variables that its metrics have labels for. "All" is the regular expression ``.*``, which also
matches a label that is absent.
"""

from __future__ import annotations

INTERVAL = "$__rate_interval"

REQUEST = 'k8s_namespace_name=~"$namespace"'
"""Spans from before an endpoint is chosen."""
SERVER = f'{REQUEST},llmtrace_role=~"$role",service_instance_id=~"$endpoint",gen_ai_request_model=~"$model"'
"""Spans of model servers, and their latencies TTFT and TPOT."""
VLLM = 'namespace=~"$namespace",role=~"$role",instance=~"$endpoint",model_name=~"$model"'
"""vLLM's own metrics."""
PICKER = 'namespace=~"$namespace",model_name=~"$model"'
"""The picker's metrics of requests."""
ENVOY = 'namespace=~"$namespace",envoy_http_conn_manager_prefix!~"admin|async-client"'
"""Envoy's metrics of the gateway's listeners."""

CALLS = "llmtrace_span_calls_total"
DURATION = "llmtrace_span_duration_seconds"
TTFT = "gen_ai_server_time_to_first_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
ERROR = 'status_code="STATUS_CODE_ERROR"'


def rate(metric: str, selector: str, by: str = "") -> str:
    """Increase per second of a counter, summed by labels."""
    return f"{_sum(by)} (rate({metric}{{{selector}}}[{INTERVAL}]))"


def gauge(metric: str, selector: str, by: str = "") -> str:
    """A gauge, summed by labels."""
    return f"{_sum(by)} ({metric}{{{selector}}})"


def quantile(share: float, histogram: str, selector: str, by: str = "") -> str:
    """A quantile of a classic histogram, by labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', selector, labels)})"


def mean(histogram: str, selector: str, by: str = "") -> str:
    """The mean of a histogram, by labels; nothing where there is no observation."""
    return per(rate(f"{histogram}_sum", selector, by), rate(f"{histogram}_count", selector, by))


def per(part: str, whole: str) -> str:
    """A ratio; nothing where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def or_zero(expr: str) -> str:
    """The expression without labels, or 0 where it gives nothing."""
    return f"({expr} or vector(0))"


def grown(counter: str, selector: str, by: str, window: str = INTERVAL) -> str:
    """Growth within the window of a counter whose series begin with what they count.

    ``increase`` alone does not see that first value.
    """
    series = f"{counter}{{{selector}}}"
    return f"{_sum(by)} (({series} unless {series} offset {window}) or increase({series}[{window}]))"


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
