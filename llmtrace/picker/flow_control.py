"""Flow control: a queue in front of scheduling, where requests wait while the pool is saturated.

One priority band, first come first served: llm-d's defaults. Beyond llm-d, each request's stay is a span of its own.

Source: llm-d-router, pkg/epp/flowcontrol and pkg/epp/requestcontrol/admission.go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

from llmtrace.picker.endpoints import Endpoint, Pool
from llmtrace.picker.metrics import PREFIX, Metrics, RequestSeries
from llmtrace.picker.plugin import SaturationDetector
from llmtrace.picker.plugins.by_label_filter import ROLE_LABEL
from llmtrace.picker.request import InferenceRequest, RequestError
from llmtrace.semconv import attributes as a
from llmtrace.spans import Span

DISPATCH_S = 0.002
"""Time between two dispatches while requests wait; each lets one request go. llm-d's: 1 ms."""
DEFAULT_MAX_REQUESTS = 5000
DEFAULT_TTL_S = 60.0
PREFILL = frozenset({"prefill", "encode-prefill"})
DECODE = frozenset({"", "decode"})
BOTH = frozenset({"both", "prefill-decode", "encode-prefill-decode"})
_DURATIONS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MODEL = ("model_name", "target_model_name")


@dataclass(frozen=True)
class FlowSettings:
    """How long and how many. A time to live of 0 lets requests wait without end; ``no_endpoint_ttl_s`` counts while
    there is no endpoint."""

    detector: SaturationDetector[Any]
    max_requests: int = DEFAULT_MAX_REQUESTS
    ttl_s: float = DEFAULT_TTL_S
    no_endpoint_ttl_s: float = DEFAULT_TTL_S


class FlowMetrics:
    """llm-d's metrics of flow control."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = f"{PREFIX}flow_control_"
        flow = ("fairness_id", "priority", "inference_pool", *_MODEL)
        self.size = Gauge(f"{prefix}queue_size", "Requests that wait in flow control.", flow, registry=registry)
        self.bytes = Gauge(
            f"{prefix}queue_bytes", "Size of the requests that wait in flow control.", flow, registry=registry
        )
        self.duration = Histogram(
            f"{prefix}request_queue_duration_seconds",
            "Time that a request spends in flow control.",
            ("fairness_id", "priority", "outcome", "inference_pool", *_MODEL),
            buckets=_DURATIONS,
            registry=registry,
        )
        self.requests = Counter(
            f"{prefix}requests_total",
            "Requests that passed flow control.",
            ("outcome", "priority", "inference_pool"),
            registry=registry,
        )


class _RefusedError(Exception):
    """A request that flow control does not let through: llm-d's outcome, and the error that answers it."""

    def __init__(self, outcome: str, error: RequestError) -> None:
        super().__init__(outcome)
        self.outcome = outcome
        self.error = error


@dataclass(eq=False)
class _Item:
    """A request that waits; ``since`` is when it came, by the monotonic clock."""

    gate: asyncio.Future[None]
    since: float


class FlowControl:
    """The queue. :meth:`run` must run for requests that wait to go on."""

    def __init__(self, settings: FlowSettings, pool: Pool, metrics: Metrics) -> None:
        self._settings = settings
        self._pool = pool
        self._metrics = FlowMetrics(metrics.registry)
        self._queue: deque[_Item] = deque()
        self._filled = asyncio.Event()
        self._empty_pool = False
        self._regime_since = perf_counter()
        metrics.registry.register(_SaturationCollector(self, pool.name, settings.detector))

    async def admit(self, request: InferenceRequest, series: RequestSeries, parent: Span) -> None:
        """Wait until the request may be scheduled; raises RequestError where it may not."""
        model, target, fairness, priority = series.labels
        flow = (fairness, priority, self._pool.name, model, target)
        size, total = self._metrics.size.labels(*flow), self._metrics.bytes.labels(*flow)
        saturation, begun, outcome = self.saturation(), perf_counter(), "EvictedContextCancelled"
        size.inc()
        total.inc(request.size_bytes)
        try:
            with parent.child(a.FLOW_SPAN) as span:
                span.attributes = {
                    a.FLOW_OUTCOME: outcome,
                    a.FLOW_QUEUE_SIZE: len(self._queue),
                    a.FLOW_SATURATION: saturation,
                }
                try:
                    if self._queue or saturation >= 1:
                        await self._wait()
                    outcome = "Dispatched"
                except _RefusedError as refused:
                    outcome = refused.outcome
                    span.fail(refused.error.code, str(refused.error))
                    raise refused.error from None
                finally:
                    span.attributes[a.FLOW_OUTCOME] = outcome
        finally:
            size.dec()
            total.dec(request.size_bytes)
            self._metrics.requests.labels(outcome, priority, self._pool.name).inc()
            self._metrics.duration.labels(fairness, priority, outcome, self._pool.name, model, target).observe(
                perf_counter() - begun
            )

    def saturation(self) -> float:
        """The saturation that counts: the larger one of the stages."""
        return self.stages()["effective"]

    def stages(self) -> dict[str, float]:
        """The saturation of each stage that has endpoints, and the effective one."""
        pool = self._pool.ready()
        detect = self._settings.detector.saturation
        found = {name: detect(part) for name, part in _stages(pool) if part}
        return {**found, "effective": max(found.values()) if found else detect(pool)}

    async def run(self) -> None:
        """Let waiting requests go, one at a time, while the pool is not saturated."""
        while True:
            if not self._queue:
                self._filled.clear()
                await self._filled.wait()
            self._expire()
            if self._queue and self.saturation() < 1:
                self._finish(self._queue.popleft())
            await asyncio.sleep(DISPATCH_S)

    async def _wait(self) -> None:
        if len(self._queue) >= self._settings.max_requests:
            raise self._full()
        item = _Item(asyncio.get_running_loop().create_future(), perf_counter())
        self._queue.append(item)
        self._filled.set()
        try:
            await item.gate
        finally:
            if item in self._queue:
                self._queue.remove(item)

    def _expire(self) -> None:
        """Refuse the requests that waited too long. A pool that loses or gets its endpoints starts the time anew."""
        now, empty = perf_counter(), not self._pool.ready()
        if empty != self._empty_pool:
            self._empty_pool, self._regime_since = empty, now
        ttl = self._settings.no_endpoint_ttl_s if empty else self._settings.ttl_s
        while ttl and self._queue and now - max(self._queue[0].since, self._regime_since) > ttl:
            self._finish(self._queue.popleft(), _expired(empty))

    @staticmethod
    def _finish(item: _Item, refused: _RefusedError | None = None) -> None:
        if item.gate.done():
            return
        if refused is None:
            item.gate.set_result(None)
        else:
            item.gate.set_exception(refused)

    def _full(self) -> _RefusedError:
        if not self._pool.ready():
            message = "no endpoints available: request rejected pre-queue: no endpoints available"
            error = RequestError(503, "ServiceUnavailable", message, a.DROPPED_NO_ENDPOINTS)
            return _RefusedError("RejectedNoEndpoints", error)
        message = "request rejected pre-queue: queue at capacity"
        return _RefusedError("RejectedCapacity", RequestError(429, "ResourceExhausted", message, a.DROPPED_SATURATED))


def _expired(empty: bool) -> _RefusedError:
    cause = "request evicted from queue: request TTL expired"
    if empty:
        message = f"request timed out in queue and no endpoints are available: {cause}"
        error = RequestError(503, "ServiceUnavailable", message, a.DROPPED_NO_ENDPOINTS)
        return _RefusedError("EvictedNoEndpoints", error)
    error = RequestError(429, "ResourceExhausted", f"request timed out in queue: {cause}", a.DROPPED_TTL_EXPIRED)
    return _RefusedError("EvictedTTL", error)


def _stages(pool: Sequence[Endpoint]) -> Iterator[tuple[str, list[Endpoint]]]:
    """The endpoints that prefill and those that decode, by their role; those without a role decode."""
    for name, roles in (("prefill", PREFILL | BOTH), ("decode", DECODE | BOTH)):
        yield name, [e for e in pool if e.labels.get(ROLE_LABEL, "") in roles]


class _SaturationCollector:
    """Gauges that are computed when they are scraped."""

    def __init__(self, flow: FlowControl, pool: str, detector: SaturationDetector[Any]) -> None:
        self._flow = flow
        self._pool = pool
        self._detector = detector

    def collect(self) -> Iterator[GaugeMetricFamily]:
        saturation = GaugeMetricFamily(
            f"{PREFIX}flow_control_pool_saturation", "Saturation of the pool.", labels=["inference_pool", "stage"]
        )
        for stage, value in self._flow.stages().items():
            saturation.add_metric([self._pool, stage], value)
        yield saturation
        stale = GaugeMetricFamily(
            f"{PREFIX}flow_control_stale_endpoints", "Endpoints whose metrics are old.", labels=["detector"]
        )
        stale.add_metric([self._detector.name], self._detector.stale)
        yield stale
