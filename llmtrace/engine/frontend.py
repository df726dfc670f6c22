"""The API server's side: finds ``llm_request``'s id, meets the facts, and makes the spans in a thread of its own.

``llm_request`` is made by vLLM at the end of a request, in this process. Its id is seen, not chosen: while vLLM makes
it, a SpanProcessor on vLLM's own tracer provider sees it start. So sampling, resource and export are vLLM's, whatever
they are configured to, and where vLLM's sampler drops the request there are no children either.

Three ways to end, each giving the spans once:

- The engine ended it: facts and ``llm_request`` come together.
- The API server found a stop string: ``llm_request`` comes first, the facts follow when the engine has heard of it.
- The client hung up: vLLM makes no ``llm_request``; it is made here when the facts arrive.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llmtrace import __version__
from llmtrace.engine.drops import publish
from llmtrace.engine.facts import ABORTED, DEPARTED_HEADER, FACTS_HEADER, Facts, from_wire, is_sampled
from llmtrace.engine.hooks import Guard, logger
from llmtrace.engine.spans import Attributes, Window, phases, write, write_aborted
from llmtrace.semconv import attributes as names

QUEUE_SIZE = 4096
"""Requests whose spans are yet to be made; beyond it they are dropped and counted."""
PENDING_SIZE = 1024
"""Requests whose ``llm_request`` is there and whose facts are not."""
PAUSE_S = 0.5
"""Between two turns of the thread: one request's spans cost less CPU right after another's."""
FLUSH_S = 2.0
_STOP_STRING = "stop"

# vLLM appends 8 hexadecimal digits to the client's id, and prefixes the index of each of n.
_INTERNAL_ID = re.compile(r"^(?:\d+_)?(?P<external>.+?)(?:-[0-9a-f]{8})?$")


@dataclass(frozen=True, slots=True)
class Parent:
    """An ``llm_request`` as vLLM made it."""

    context: SpanContext
    window: Window
    request_id: str
    """As the client knows it."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Spans to make: below ``parent``, or, where there is none, with an ``llm_request`` below what ``headers`` say."""

    headers: Mapping[str, str]
    request_id: str
    parent: Parent | None
    finish_reason: str | None = None
    """What the client saw; the engine knows a stop string only as an abort."""


class RequestSpanWatch(SpanProcessor):
    """Sees ``llm_request`` start in the thread that asked to see it.

    The SDK calls it from within vLLM's own code, so that it has the guard too; once switched off it touches no span.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._watch = threading.local()

    def begin(self, attributes: Attributes) -> None:
        """Watch from now on, in this thread; the span gets ``attributes``, besides what vLLM gives it."""
        self._watch.attributes = attributes
        self._watch.span = None

    def end(self) -> Span | None:
        """Stop watching: the span seen, if any."""
        span: Span | None = getattr(self._watch, "span", None)
        self._watch.attributes = self._watch.span = None
        return span

    def on_start(self, span: Span, parent_context: context_api.Context | None = None) -> None:
        """Remember the span, if it is the one."""
        if self._guard.on:
            self._guard.run("SpanProcessor.on_start", self._seen, span)

    def _seen(self, span: Span) -> None:
        attributes: Attributes | None = getattr(self._watch, "attributes", None)
        if attributes is not None and span.name == names.SERVER_SPAN:
            self._watch.span = span
            span.set_attributes(attributes)

    def on_end(self, span: ReadableSpan) -> None:
        """Nothing: vLLM exports it."""


class Frontend:
    """Meets ``llm_request`` and facts, by request, and hands both to a thread that makes the spans."""

    def __init__(self, guard: Guard, queue_size: int = QUEUE_SIZE, pending_size: int = PENDING_SIZE) -> None:
        self.dropped = 0
        self._guard = guard
        self._watch = RequestSpanWatch(guard)
        self._provider: trace.TracerProvider | None = None
        self._pending: OrderedDict[str, Parent] = OrderedDict()
        self._pending_size = pending_size
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None

    def clear(self) -> None:
        """Let go of everything."""
        self._pending.clear()

    def tracing(self, output: Any, state: Any) -> None:
        """VLLM is about to make ``llm_request``."""
        if not is_sampled(output.trace_headers):
            return
        provider = trace.get_tracer_provider()
        if provider is not self._provider:
            add = getattr(provider, "add_span_processor", None)
            if add is None:
                return  # no SDK: nothing is exported
            add(self._watch)
            self._provider = provider
        self._watch.begin(_request_attributes(output, state))

    def traced(self, output: Any, state: Any) -> None:
        """VLLM has made ``llm_request``."""
        span = self._watch.end()
        if span is None:
            return
        request_id = str(getattr(state, "external_req_id", "") or external_id(output.request_id))
        window = Window(span.start_time or 0, span.end_time or time.time_ns())
        parent = Parent(span.get_span_context(), window, request_id)
        headers = output.trace_headers
        if FACTS_HEADER in headers:
            self._submit(_Job(headers, output.request_id, parent))
            return
        self._pending[output.request_id] = parent
        if len(self._pending) > self._pending_size:
            self._pending.popitem(last=False)
            self._drop()

    def receive(self, outputs: list[Any], known: Container[str]) -> None:
        """Messages from the engine core; ``known`` are the requests that vLLM still has an ``llm_request`` to make for.

        Those that this plugin added are taken out. A request may also have ended in the engine while its abort was on
        the way: then vLLM ignores its last output, and the facts in it are all there is.
        """
        orphans = []
        added = False
        for item in outputs:
            if item.finish_reason is None or not item.trace_headers or FACTS_HEADER not in item.trace_headers:
                continue
            departed = DEPARTED_HEADER in item.trace_headers
            if departed or item.request_id not in known:
                orphans.append(item)
            added |= departed
        if added:
            outputs[:] = [item for item in outputs if DEPARTED_HEADER not in (item.trace_headers or ())]
        for item in orphans:
            parent = self._pending.pop(item.request_id, None)
            reason = ABORTED if parent is None else _STOP_STRING
            self._submit(_Job(item.trace_headers, item.request_id, parent, reason))

    def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Make the spans of what is queued; called at exit, before vLLM shuts its tracer provider down."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=timeout_s)
                thread.join(timeout_s)

    def _submit(self, job: _Job) -> None:
        if self._thread is None:
            # Started with the first request, not before: vLLM forks.
            self._thread = threading.Thread(target=self._work, name="llmtrace-engine-spans", daemon=True)
            self._thread.start()
            atexit.register(self.flush)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._drop()

    def _drop(self) -> None:
        if self.dropped == 0:
            logger.warning(
                "llmtrace: engine spans of some requests are dropped; metric %s", names.ENGINE_DROPPED_METRIC
            )
        self.dropped += 1

    def _work(self) -> None:
        self._guard.run("the metric of drops", publish, lambda: self.dropped)
        while (job := self._jobs.get()) is not None:
            if self._guard.on:
                self._guard.run("making spans", _make, job)
            # Between two requests, let the event loop have Python's lock at once if it waits for it.
            time.sleep(PAUSE_S if self._jobs.empty() else 0)


def external_id(internal: str) -> str:
    """The request's id as the client knows it, from vLLM's internal one: ``1_cmpl-x-0-89abcdef`` is ``cmpl-x-0``."""
    match = _INTERNAL_ID.match(internal)
    return match["external"] if match else internal


def _request_attributes(output: Any, state: Any) -> Attributes:
    reason = output.finish_reason
    attributes: Attributes = {names.FINISH_REASONS: (_STOP_STRING if reason is None else str(reason),)}
    cached = getattr(state, "num_cached_tokens", None)
    if cached is not None:
        attributes[names.CACHED_TOKENS] = cached
    return attributes


def _make(job: _Job) -> None:
    facts: Facts | None = from_wire(job.headers[FACTS_HEADER])
    if facts is None:
        return
    if job.finish_reason is not None:
        facts.finish_reason = job.finish_reason
    tracer = trace.get_tracer(names.ENGINE_SCOPE, __version__)
    if job.parent is not None:
        write(tracer, job.parent.context, phases(facts, job.parent.request_id, job.parent.window))
        return
    context = TraceContextTextMapPropagator().extract(job.headers)
    caller = trace.get_current_span(context).get_span_context()
    if caller.is_valid and caller.trace_flags & TraceFlags.SAMPLED:
        write_aborted(tracer, caller, facts, external_id(job.request_id))
