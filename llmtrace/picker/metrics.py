"""The picker's Prometheus metrics, under the names, labels and buckets of llm-d's EPP.

Source: llm-d-router, pkg/epp/metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from llmtrace.picker.endpoints import Pool

T = TypeVar("T")

PREFIX = "llm_d_epp_"
OVERFLOW = "other"
"""Label value for what exceeds :data:`MAX_SERIES`: model names and fairness ids come from clients."""
UNKNOWN_MODEL = "unknown"
"""llm-d's label value, in the metric disagg_decision_total alone, for requests without a model."""
MAX_SERIES = 1000
MAX_LABEL_LENGTH = 200

_MODEL = ("model_name", "target_model_name", "fairness_id", "priority")
_PLUGIN = ("extension_point", "plugin_type", "plugin_name")
_POD = "pod_identifier"
_SECONDS = (
    *(0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60),
    *(120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600),
)
_TTFT = (*_SECONDS[:23], 120)
_TPOT = (
    *(0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    *(1, 2),
)
_TOKENS = tuple(1 if n == 0 else 4 * 2**n for n in range(19))
_BYTES = tuple(2**n for n in range(6, 31))
_SCHEDULING = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_PROCESSING = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RATIO = tuple(n / 10 for n in range(11))


class RequestSeries:
    """The time series of one combination of model, fairness id and priority."""

    def __init__(self, metrics: Metrics, labels: Sequence[str]) -> None:
        self.requests = metrics.requests.labels(*labels)
        self.running = metrics.running.labels(*labels)
        self.duration = metrics.duration.labels(*labels)
        self.request_size = metrics.request_size.labels(*labels)
        self.response_size = metrics.response_size.labels(*labels)
        self.input_tokens = metrics.input_tokens.labels(*labels)
        self.output_tokens = metrics.output_tokens.labels(*labels)
        self.cached_tokens = metrics.cached_tokens.labels(*labels)
        self.tpot = metrics.tpot.labels(*labels)
        self.ttft = {streaming: metrics.ttft.labels(*labels, str(streaming).lower()) for streaming in (True, False)}
        self._errors = metrics.errors
        self.labels = tuple(labels)

    def error(self, code: str) -> None:
        """Count a failed request under llm-d's error code."""
        self._errors.labels(*self.labels, code).inc()


class KVCacheMetrics:
    """What is known of the servers' KV caches. Where llm-d has no metric, the name begins with ``llmtrace_``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(name, help_, labels, registry=registry)

        events, index, own = f"{PREFIX}kv_cache_events_", f"{PREFIX}kv_cache_index_", "llmtrace_kv_cache_events_"
        self.subscribers = Gauge(f"{events}active_subscribers", "Subscriptions to servers.", registry=registry)
        self.received = counter(f"{events}messages_received_total", "Messages from servers.", _POD)
        self.errors = counter(f"{events}zmq_errors_total", "Failures of a subscription.", _POD, "operation")
        self.skipped = counter(f"{events}stores_skipped_total", "Stores left out of the index.", "cache_kind", "reason")
        self.missed = counter(f"{own}missed_total", "Messages of a server that the index lacks.", _POD)
        self.dropped = counter(f"{own}dropped_total", "Messages that were not understood.", _POD)
        self.admissions = counter(f"{index}admissions_total", "Blocks that came into the index.")
        self.evictions = counter(f"{index}evictions_total", "Blocks that left the index.")
        self.lookups = counter(f"{index}lookup_requests_total", "Lookups of a prompt.")
        self.hits = counter(f"{index}lookup_hits_total", "Leading blocks of a prompt on the best server, per lookup.")

    def forget(self, pod_identifier: str) -> None:
        """Drop the series of a server that is gone."""
        for metric in (self.received, self.missed, self.dropped, self.errors):
            metric.remove_by_labels({_POD: pod_identifier})


class Metrics:
    """All metrics of one picker in a registry of their own."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, help_, labels, registry=self.registry)

        def histogram(name: str, help_: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(PREFIX + name, help_, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("request_total", "Processed requests.", _MODEL)
        self.errors = counter("request_error_total", "Failed requests.", (*_MODEL, "error_code"))
        self.running = Gauge(
            f"{PREFIX}request_running", "Requests that are running now.", _MODEL, registry=self.registry
        )
        self.duration = histogram(
            "request_duration_seconds", "Time from request to the response's end.", _SECONDS, _MODEL
        )
        self.request_size = histogram("request_size_bytes", "Size of request bodies.", _BYTES, _MODEL)
        self.response_size = histogram("response_size_bytes", "Size of response bodies.", _TOKENS, _MODEL)
        self.input_tokens = histogram("request_input_tokens", "Prompt tokens of a request.", _TOKENS, _MODEL)
        self.output_tokens = histogram("request_output_tokens", "Generated tokens of a request.", _TOKENS, _MODEL)
        self.cached_tokens = histogram(
            "request_cached_tokens",
            "Prompt tokens read from the cache, as the model server reports.",
            _TOKENS,
            _MODEL,
        )
        self.ttft = histogram(
            "request_ttft_seconds",
            "Time from request to the response's first byte.",
            _TTFT,
            (*_MODEL, "streaming"),
        )
        self.tpot = histogram(
            "request_streaming_tpot_seconds",
            "Mean time per output token after the first, of streamed responses.",
            _TPOT,
            _MODEL,
        )
        self.scheduling = histogram("scheduler_e2e_duration_seconds", "Time to schedule a request.", _SCHEDULING)
        self.attempts = counter(
            "scheduler_attempts_total",
            "Scheduling attempts.",
            ("status", "target_model_name", "endpoint_name", "namespace", "port"),
        )
        self.plugin = histogram("plugin_duration_seconds", "Time in a plugin.", _SCHEDULING, _PLUGIN)
        self.request_processing = histogram(
            "request_processing_duration_seconds",
            "Time from a request's receipt until it is routed or answered.",
            _PROCESSING,
        )
        self.prefix_size = Gauge(
            f"{PREFIX}prefix_indexer_size",
            "Blocks in the prefix index.",
            ("plugin_name", "plugin_type"),
            registry=self.registry,
        )
        self.prefix_hit_ratio = histogram(
            "prefix_indexer_hit_ratio",
            "Share of the prompt that the picked endpoint should have cached.",
            _RATIO,
            ("plugin_name", "plugin_type"),
        )
        self.disagg = counter(
            "disagg_decision_total",
            "Requests by the stages that they were split into.",
            ("plugin_name", "plugin_type", "model_name", "decision_type"),
        )
        self.registry.register(_PoolCollector(pool))
        self._pairs = _Bounded[tuple[str, str]](MAX_SERIES)
        self._models = _Bounded[str](MAX_SERIES)
        self.series = lru_cache(MAX_SERIES)(self._series)

    @cached_property
    def kv_cache(self) -> KVCacheMetrics:
        """Metrics of the KV caches, where a plugin follows them."""
        return KVCacheMetrics(self.registry)

    def _series(self, model: str, fairness_id: str) -> RequestSeries:
        # A combination takes some 60 KiB and is never given back.
        pair = self._pairs.bound((model[:MAX_LABEL_LENGTH], fairness_id[:MAX_LABEL_LENGTH] or "default-flow"))
        name, tenant = pair or (OVERFLOW, OVERFLOW)
        return RequestSeries(self, (name, name, tenant, "0"))

    def attempt(self, success: bool, model: str, name: str = "", namespace: str = "", port: str = "") -> None:
        """Count a scheduling attempt and where it led."""
        status = "success" if success else "failure"
        self.attempts.labels(status, self._model(model), name, namespace, port).inc()

    def disaggregated(self, plugin_name: str, plugin_type: str, model: str, decision: str) -> None:
        """Count a request by what a disaggregating profile handler decided; ``decision`` as llm-d writes it."""
        self.disagg.labels(plugin_name, plugin_type, self._model(model or UNKNOWN_MODEL), decision).inc()

    def _model(self, name: str) -> str:
        known = self._models.bound(name[:MAX_LABEL_LENGTH])
        return OVERFLOW if known is None else known


class _Bounded(Generic[T]):
    """Admits a limited number of distinct values."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[T] = set()

    def bound(self, value: T) -> T | None:
        """The value, or None where there are too many already."""
        if value not in self._seen:
            if len(self._seen) >= self._limit:
                return None
            self._seen.add(value)
        return value


class _PoolCollector:
    """The pool's gauges, computed when they are scraped."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready = self._pool.ready()
        values = {
            "ready_endpoints": ("Endpoints that are ready.", float(len(ready))),
            "average_kv_cache_utilization": (
                "Mean share of KV cache in use.",
                _mean([e.load.kv_cache_usage for e in ready]),
            ),
            "average_queue_size": (
                "Mean number of waiting requests.",
                _mean([e.load.waiting for e in ready]),
            ),
            "average_running_requests": (
                "Mean number of running requests.",
                _mean([e.load.running for e in ready]),
            ),
        }
        for name, (help_, value) in values.items():
            family = GaugeMetricFamily(PREFIX + name, help_, labels=["name"])
            family.add_metric([self._pool.name], value)
            yield family
        queues = GaugeMetricFamily(
            f"{PREFIX}per_endpoint_queue_size",
            "Waiting requests of an endpoint.",
            labels=["name", "model_server_endpoint"],
        )
        for endpoint in ready:
            queues.add_metric([self._pool.name, endpoint.name], endpoint.load.waiting)
        yield queues


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
