"""One HTTP exchange as Envoy shows it to the picker: a request that is routed, and the response to it.

The order of answers is that of full-duplex streaming: nothing until the request's body is complete, then the headers
with the destination, then the body; the response's parts are passed on one by one.

Source: llm-d-router, pkg/epp/handlers.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, time_ns
from typing import Any

from opentelemetry.trace import SpanKind

from llmtrace.picker.endpoints import Endpoint, Pool
from llmtrace.picker.ext_proc import OVERWRITE, ProcessingResponse
from llmtrace.picker.flow_control import FlowControl
from llmtrace.picker.metrics import Metrics, RequestSeries
from llmtrace.picker.request import InferenceRequest, RequestError, no_endpoints, parse, too_large
from llmtrace.picker.response import ResponseReader, Usage
from llmtrace.picker.scheduler import Scheduler
from llmtrace.semconv import attributes as a
from llmtrace.spans import Span, Tracer, remote_parent, traceparent

GATEWAY_SCOPE = "llm-d-router/pkg/epp/handlers"
ORCHESTRATION_SCOPE = "llm-d-router/pkg/epp/requestcontrol"
MAX_BODY_BYTES = 32 << 20
"""A larger request is answered with 413; the body is held in memory until it is complete."""
CHUNK_BYTES = 62_000
"""Bodies go back to Envoy in pieces of at most this size, as llm-d's do."""
REQUEST_PRIORITY = 0
PICKERS_HEADERS = (a.PREFILLER_HEADER, a.ENCODERS_HEADER)
"""Headers by which a picker tells the decode server's sidecar where to send parts of the work."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What an exchange works with."""

    pool: Pool
    scheduler: Scheduler
    metrics: Metrics
    gateway: Tracer
    orchestration: Tracer
    flow_control: FlowControl | None = None

    @classmethod
    def make(
        cls,
        pool: Pool,
        scheduler: Scheduler,
        metrics: Metrics,
        tracer: Tracer,
        flow_control: FlowControl | None = None,
    ) -> Services:
        """The services with the tracer in the scopes that llm-d uses."""
        gateway, orchestration = tracer.scoped(GATEWAY_SCOPE), tracer.scoped(ORCHESTRATION_SCOPE)
        return cls(pool, scheduler, metrics, gateway, orchestration, flow_control)


class Exchange:
    """State of one exchange. Give it every message in turn by :meth:`handle`, and call :meth:`close` at the end.

    ``metadata`` is that of the gRPC stream, where Envoy puts the context of its own span.
    """

    def __init__(self, services: Services, metadata: Mapping[str, str]) -> None:
        self._services = services
        self._metadata = metadata
        self._headers: dict[str, str] = {}
        self._hosts: frozenset[str] | None = None
        self._body = bytearray()
        self._span: Span | None = None
        self._series: RequestSeries | None = None
        self._running = False
        self._endpoint: Endpoint | None = None
        self._destination = ""
        self._added: Mapping[str, str] = {}
        self._request: InferenceRequest | None = None
        self._reader: ResponseReader | None = None
        self._streaming = False
        self._status = 0
        self._response_bytes = 0
        self._started = perf_counter()
        self._first_byte: float | None = None
        self._ended: float | None = None
        self._ended_ns: int | None = None
        self._error_code = ""
        self._handlers: dict[str | None, Callable[[Any], Coroutine[Any, Any, list[Any]]]] = {
            "request_headers": self._request_headers,
            "request_body": self._request_body,
            "request_trailers": self._request_trailers,
            "response_headers": self._response_headers,
            "response_body": self._response_body,
            "response_trailers": self._response_trailers,
        }
        self.answered = False
        """Whether the picker itself answered the request, so that nothing more is to come."""

    async def handle(self, message: Any) -> list[Any]:
        """Take a ProcessingRequest; return the ProcessingResponses to send now, in order."""
        handler = self._handlers.get(message.WhichOneof("request"))
        if handler is None:
            return []
        try:
            return await handler(message)
        except RequestError as error:
            self.answered = True
            self._error_code = error.code
            if self._span is not None:
                self._span.fail(error.code, str(error))
            self._services.metrics.request_processing.observe(perf_counter() - self._started)
            return [_immediate(error)]

    @property
    def complete(self) -> bool:
        """Whether the response passed as a whole, or the picker gave its own."""
        return self.answered or self._ended is not None

    def close(self, *, cancelled: bool = False) -> None:
        """The stream is over: observe the metrics and end the span."""
        span = self._span
        if span is None:
            return
        if self._running and self._series is not None:
            self._series.running.dec()
        if self._endpoint is not None:
            self._endpoint.in_flight -= 1
        if not self.complete:
            self._error_code = "ClientDisconnect" if cancelled or not self._status else "Incomplete"
            span.fail(self._error_code, "the exchange ended before the response was complete")
        self._observe(span)
        if self._error_code:
            (self._series or self._services.metrics.series("", "")).error(self._error_code)
        # Envoy's span of the stream ends with the response's last part; this one must not outlive it.
        span.end(self._ended_ns)

    # Messages, in the order in which they come.

    async def _request_headers(self, message: Any) -> list[Any]:
        self._headers = headers = _headers(message.request_headers.headers.headers)
        request_id = headers.setdefault("x-request-id", str(uuid.uuid4()))
        self._hosts = _subset(message.metadata_context.filter_metadata)
        # Envoy's span of this stream comes in the stream's metadata; without it, the caller's in the headers.
        parent = remote_parent(self._metadata, headers)
        self._span = span = self._services.gateway.start(a.GATEWAY_SPAN, parent, SpanKind.SERVER)
        span.attributes[a.REQUEST_ID] = request_id
        if (told := headers.get(a.CALLER_HEADER)) is not None:
            # The gateway began a new trace, and tells the caller's.
            caller = remote_parent({"traceparent": told})
            if caller and caller.trace_id != span.context.trace_id:
                span.links = (caller,)
        if not message.request_headers.end_of_stream:
            return []
        # Without a body there is nothing to schedule by: any endpoint will do.
        ready = self._ready()
        self._take(InferenceRequest(id=request_id, headers=headers), [random.choice(ready)])
        return [self._routed()]

    async def _request_body(self, message: Any) -> list[Any]:
        if len(self._body) + len(message.request_body.body) > MAX_BODY_BYTES:
            raise too_large(MAX_BODY_BYTES)
        self._body += message.request_body.body
        return await self._route(end_of_stream=True) if message.request_body.end_of_stream else []

    async def _request_trailers(self, message: Any) -> list[Any]:
        routed = [] if self._request is not None else await self._route(end_of_stream=False)
        trailers = ProcessingResponse()
        trailers.request_trailers.SetInParent()
        return [*routed, trailers]

    async def _response_headers(self, message: Any) -> list[Any]:
        headers = _headers(message.response_headers.headers.headers)
        status = headers.get(":status", "")
        self._status = int(status) if status.isdigit() else 0
        self._streaming = "text/event-stream" in headers.get("content-type", "")
        self._reader = ResponseReader(streaming=self._streaming)
        response = ProcessingResponse()
        _set_header(response.response_headers.response.header_mutation, "x-went-into-resp-headers", "true")
        if message.response_headers.end_of_stream:
            self._finish()
        return [response]

    async def _response_body(self, message: Any) -> list[Any]:
        chunk: bytes = message.response_body.body
        end = message.response_body.end_of_stream
        if chunk:
            self._response_bytes += len(chunk)
            if self._first_byte is None:
                self._first_byte = perf_counter()
            if self._reader is not None:
                self._reader.feed(chunk)
        if end:
            self._finish()
        return [_body("response_body", chunk, end)]

    async def _response_trailers(self, message: Any) -> list[Any]:
        self._finish()
        trailers = ProcessingResponse()
        trailers.response_trailers.SetInParent()
        return [trailers]

    # Steps.

    async def _route(self, *, end_of_stream: bool) -> list[Any]:
        body = bytes(self._body)
        self._body.clear()
        request = parse(self._headers["x-request-id"], self._headers, body)
        await self._schedule(request)
        self._services.metrics.request_processing.observe(perf_counter() - self._started)
        return [self._routed(), *_bodies("request_body", body, end_of_stream)]

    async def _schedule(self, request: InferenceRequest) -> None:
        assert self._span is not None  # noqa: S101 - headers come first
        services = self._services
        span = self._span.child(a.ORCHESTRATION_SPAN, SpanKind.SERVER, services.orchestration)
        span.attributes = {a.TARGET_MODEL: request.model, a.REQUEST_PRIORITY: REQUEST_PRIORITY}
        request.span = span
        self._series = services.metrics.series(request.model, request.fairness_id)
        try:
            if services.flow_control is not None:
                await services.flow_control.admit(request, self._series, span)
            ready = self._ready()
            try:
                if await services.scheduler.tokenize(request, ready):
                    ready = self._ready()
                result = services.scheduler.schedule(request, ready, span)
                self._added = services.scheduler.scheduled(request, result, span)
            except RequestError:
                raise
            except Exception as error:
                # Scheduling must not fail a request that an endpoint could serve.
                _log.exception("request %s: scheduling failed, any endpoint gets it", request.id)
                span.fail(type(error).__name__, "scheduling failed, any endpoint gets the request")
                self._take(request, [random.choice(ready)])
                return
            self._take(request, result.endpoints)
        except RequestError as error:
            span.fail(error.code, str(error))
            raise
        finally:
            request.body = None
            span.end()

    def _ready(self) -> list[Endpoint]:
        ready = self._services.pool.ready(self._hosts)
        if not ready:
            raise no_endpoints()
        return ready

    def _take(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """The request goes to these endpoints; observe it from here on."""
        assert self._span is not None  # noqa: S101 - headers come first
        self._request = request
        self._destination = ",".join(endpoint.address for endpoint in endpoints)
        self._span.attributes[a.ENDPOINT] = endpoints[0].address
        self._span.attributes[a.ENDPOINT_NAME] = endpoints[0].id
        if self._series is None:
            self._series = self._services.metrics.series(request.model, request.fairness_id)
        self._series.requests.inc()
        self._series.request_size.observe(request.size_bytes)
        self._series.running.inc()
        self._running = True
        self._endpoint = endpoints[0]
        self._endpoint.in_flight += 1

    def _routed(self) -> Any:
        """The answer to the request's headers: the destination, and the span to hang under."""
        assert self._span is not None  # noqa: S101 - headers come first
        response = ProcessingResponse()
        common = response.request_headers.response
        common.clear_route_cache = True
        _set_header(common.header_mutation, a.DESTINATION_HEADER, self._destination)
        for header, value in self._added.items():
            _set_header(common.header_mutation, header, value)
        # What only a picker may say must not come from a client.
        common.header_mutation.remove_headers.extend(h for h in PICKERS_HEADERS if h not in self._added)
        if self._services.gateway.enabled:
            _set_header(common.header_mutation, "traceparent", traceparent(self._span.context))
        fields = response.dynamic_metadata.fields[a.DESTINATION_NAMESPACE].struct_value.fields
        fields[a.DESTINATION_HEADER].string_value = self._destination
        return response

    def _finish(self) -> None:
        if self._ended is None:
            self._ended = perf_counter()
            self._ended_ns = time_ns()

    def _observe(self, span: Span) -> None:
        """Attributes and metrics of the response, as far as it came."""
        if self._status:
            span.attributes[a.HTTP_STATUS] = self._status
            if self._status >= 400:
                self._error_code = self._error_code or "ModelServerError"
            if self._status >= 500 and self._ended is not None:
                span.fail("ModelServerError", f"the model server answered {self._status}")
        if self._first_byte is not None:
            span.attributes[a.GATEWAY_TTFT] = (self._first_byte - self._started) * 1e3
        usage = self._reader.end() if self._reader is not None else Usage()
        for key, value in (
            (a.INPUT_TOKENS, usage.input_tokens),
            (a.OUTPUT_TOKENS, usage.output_tokens),
            (a.CACHED_TOKENS, usage.cached_tokens),
        ):
            if value is not None:
                span.attributes[key] = value
        if usage.finish_reasons:
            span.attributes[a.FINISH_REASONS] = tuple(usage.finish_reasons)
        if self._series is not None and self._ended is not None:
            self._observe_series(self._series, usage, self._ended)

    def _observe_series(self, series: RequestSeries, usage: Usage, ended: float) -> None:
        series.duration.observe(ended - self._started)
        series.response_size.observe(self._response_bytes)
        first = self._first_byte if self._streaming and self._first_byte is not None else ended
        series.ttft[self._streaming].observe(first - self._started)
        if usage.input_tokens is not None:
            series.input_tokens.observe(usage.input_tokens)
        if usage.cached_tokens is not None:
            series.cached_tokens.observe(usage.cached_tokens)
        if usage.output_tokens is not None:
            series.output_tokens.observe(usage.output_tokens)
            if self._streaming and usage.output_tokens > 1:
                series.tpot.observe((ended - first) / (usage.output_tokens - 1))


def _headers(values: Iterable[Any]) -> dict[str, str]:
    return {
        header.key.lower(): header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in values
    }


def _subset(entries: Iterable[Any]) -> frozenset[str] | None:
    """Addresses that the proxy limits the candidates to; None where it does not."""
    for entry in entries:
        if entry.key == a.SUBSET_NAMESPACE and a.SUBSET_KEY in entry.value.fields:
            values = entry.value.fields[a.SUBSET_KEY].list_value.values
            return frozenset(value.string_value.rpartition(":")[0] or value.string_value for value in values)
    return None


def _set_header(mutation: Any, key: str, value: str) -> None:
    option = mutation.set_headers.add(append_action=OVERWRITE)
    option.header.key = key
    option.header.raw_value = value.encode("latin-1")


def _body(part: str, chunk: bytes, end_of_stream: bool) -> Any:
    response = ProcessingResponse()
    streamed = getattr(response, part).response.body_mutation.streamed_response
    streamed.body = chunk
    streamed.end_of_stream = end_of_stream
    return response


def _bodies(part: str, body: bytes, end_of_stream: bool) -> list[Any]:
    starts = range(0, max(len(body), 1), CHUNK_BYTES)
    last = starts[-1]
    return [_body(part, body[start : start + CHUNK_BYTES], end_of_stream and start == last) for start in starts]


def _immediate(error: RequestError) -> Any:
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = error.status
    immediate.body = str(error).encode()
    if error.dropped_reason:
        _set_header(immediate.headers, a.DROPPED_REASON_HEADER, error.dropped_reason)
    return response
