"""What tests share on 127.0.0.1: free ports, waiting, samples of a metrics page, an OTLP receiver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from prometheus_client.parser import text_string_to_metric_families

from bench.processes import free_ports
from llmtrace.traces import otlp
from llmtrace.traces.model import Span, Trace

WAIT_S = 10.0
POLL_S = 0.02


def free_port() -> int:
    return free_ports(1)[0]


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S, *, poll_s: float = POLL_S) -> Any:
    """Wait for ``condition`` and return what it gives; the test fails, naming ``what``, if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for {what}")
        time.sleep(poll_s)
    return found


def sample_sum(page: str, name: str, /, **labels: str) -> float:
    """Sum of a metric's samples that have these labels, on a page of Prometheus's text format."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class Receiver(TraceServiceServicer):
    """An OTLP receiver that keeps the spans."""

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = {}
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request: Any, _: Any) -> Any:
        with self._changed:
            for span in otlp.spans(request.resource_spans):
                self._spans.setdefault(span.trace_id, []).append(span)
            self._changed.notify_all()
        return ExportTraceServiceResponse()

    def trace_ids(self) -> list[str]:
        with self._changed:
            return list(self._spans)

    def of(self, trace_id: str) -> list[Span]:
        with self._changed:
            return list(self._spans.get(trace_id, ()))

    def trace(self, trace_id: str) -> Trace:
        return Trace(trace_id, tuple(self.of(trace_id)))

    def wait(self, trace_id: str, number: int, timeout_s: float = WAIT_S) -> list[Span]:
        """The spans of a trace, once there are ``number`` or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._spans.get(trace_id, ())) >= number, timeout_s)
        return self.of(trace_id)

    def close(self) -> None:
        self._server.stop(None).wait()


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    try:
        yield receiver
    finally:
        receiver.close()
