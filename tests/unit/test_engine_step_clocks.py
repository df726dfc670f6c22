"""The clock of a CUDA device, on a stand-in for torch.cuda whose stream runs behind the host."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest
from loopback import until
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_engine_steps import RANK, WAIT_S, moe_config, record_of, sender, spans_of

from llmtrace.engine.hooks import Guard
from llmtrace.engine.steps import worker
from llmtrace.engine.steps.batch import Batch
from llmtrace.engine.steps.clocks import CudaClock, HostClock
from llmtrace.engine.steps.recorder import COMBINE, DISPATCH, EXPERTS, WAIT, Record, Recorder, phases
from llmtrace.semconv import attributes as names


class Cuda:
    """``launched_ms`` is the work that the host put on the stream, ``done_ms`` how much of it the device has done."""

    def __init__(self) -> None:
        self.launched_ms = self.done_ms = 0.0
        self.events: list[CudaEvent] = []

    def Event(self, *, enable_timing: bool) -> CudaEvent:
        assert enable_timing, "without timing an event has no time"
        self.events.append(CudaEvent(self))
        return self.events[-1]

    def synchronize(self) -> NoReturn:
        raise AssertionError("waits for the device")

    current_stream = synchronize


class CudaEvent:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.at_ms: float | None = None
        self.looks = self.read = 0

    def record(self) -> None:
        assert self.at_ms is None, "each moment has an event of its own"
        self.at_ms = self.cuda.launched_ms

    def query(self) -> bool:
        assert self.at_ms is not None
        self.looks += 1
        return self.at_ms <= self.cuda.done_ms

    def elapsed_time(self, end: CudaEvent) -> float:
        assert self.query(), "CUDA: device not ready"
        assert end.query(), "CUDA: device not ready"
        assert self.at_ms is not None
        assert end.at_ms is not None
        self.read += 1
        return end.at_ms - self.at_ms

    def synchronize(self) -> NoReturn:
        raise AssertionError("waits for the device")

    wait = synchronize


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


def a_step(cuda: Cuda, clock: CudaClock) -> Record:
    """Launches a forward pass of two layers, of which the device does nothing yet."""
    recorder = Recorder(clock)

    def phase(name: str, ms: float) -> None:
        recorder.enter()
        cuda.launched_ms += ms
        recorder.leave(name)

    cuda.launched_ms += 100.0  # of the step before
    recorder.begin(Batch("g", 7))
    cuda.launched_ms += 2.0
    phase(WAIT, 0.5)
    recorder.forward_begins(4)
    for experts_ms in (6.0, 10.0):
        cuda.launched_ms += 3.0
        phase(DISPATCH, 1.0)
        phase(EXPERTS, experts_ms)
        phase(COMBINE, 0.25)
    recorder.forward_ends()
    record = recorder.end()
    assert record is not None
    return record


def test_marks_are_events_that_are_read_when_the_device_has_passed_them(cuda: Cuda) -> None:
    clock = CudaClock(cuda)
    record = a_step(cuda, clock)
    assert len(cuda.events) == 4 + 2 * 7, "two for the step, two for the forward, two for each phase"
    assert (clock.passed(record.begin), clock.passed(record.end)) == (False, False)
    cuda.done_ms = 100.0
    assert (clock.passed(record.begin), clock.passed(record.end)) == (True, False)
    assert sum(event.read for event in cuda.events) == 0
    cuda.done_ms = cuda.launched_ms
    assert clock.passed(record.end)
    found = phases(record, clock)
    assert found is not None
    assert (found.attention, found.dispatch, found.experts, found.combine, found.wait) == (6.0, 2.0, 16.0, 0.5, 0.5)
    assert (found.layer, found.layer_ms) == (1, 11.25)
    assert clock.ms(record.begin, record.end) == 2.0 + 0.5 + 6.0 + 2.0 + 16.0 + 0.5


def test_the_span_of_a_step_has_the_device_s_times(cuda: Cuda) -> None:
    clock = CudaClock(cuda)
    record = a_step(cuda, clock)
    each, exporter = sender(clock, RANK)  # type: ignore[arg-type]
    each.send(record)
    until(lambda: record.end.looks > 1, "a second look at the marks", WAIT_S)
    assert exporter.get_finished_spans() == ()
    cuda.done_ms = cuda.launched_ms
    (span,) = spans_of(exporter, 1)
    assert span.attributes is not None
    assert (span.attributes[names.STEP_EXPERTS], span.attributes[names.STEP_WAIT]) == (16.0, 0.5)
    assert span.start_time is not None
    assert span.end_time == span.start_time + 27_000_000


def test_a_step_that_the_device_never_ends_is_given_up(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrace.engine.steps.sender.MARKS_S", 0.1)
    monkeypatch.setattr("llmtrace.engine.steps.sender.PAUSE_S", 0.01)
    clock = CudaClock(cuda)
    each, exporter = sender(clock, RANK)  # type: ignore[arg-type]
    lost, good = record_of(1), record_of(2)
    cuda.launched_ms = 5.0
    lost.begin = lost.end = clock.mark()
    cuda.launched_ms = 0.0
    good.begin = good.end = clock.mark()
    each.send(lost)
    each.send(good)
    (span,) = spans_of(exporter, 1)
    assert span.attributes is not None
    assert span.attributes[names.STEP_NUMBER] == 2
    assert each.dropped == 1


@pytest.mark.parametrize(("device", "clock"), [("cpu", HostClock), ("cuda", CudaClock)])
def test_a_worker_has_the_clock_of_its_device_and_counts_what_it_drops(
    device: str, clock: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(worker, "exporter", lambda *_: InMemorySpanExporter())
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Cuda()))
    config = moe_config(use_ubatching=False)
    config.scheduler_config = SimpleNamespace(max_num_batched_tokens=64)
    found = worker.step_worker(SimpleNamespace(rank=0, device=SimpleNamespace(type=device)), config, Guard())
    assert found is not None
    assert type(found.recorder.clock) is clock
    found._sender.dropped = 5
    data = reader.get_metrics_data()
    assert data is not None
    points = {m.name: [*m.data.data_points] for m in data.resource_metrics[0].scope_metrics[0].metrics}
    (point,) = points[names.STEPS_DROPPED_METRIC]
    assert (point.value, dict(point.attributes or {})[names.WORLD_RANK]) == (5, 2)
    config.parallel_config.use_ubatching = True
    assert worker.step_worker(SimpleNamespace(rank=0), config, Guard()) is None
