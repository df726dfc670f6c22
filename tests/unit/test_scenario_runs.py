"""Finding a run in a store, waiting for traces, and the smoke test's verdict, on a store kept in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from example_stack import STACK
from example_traces import block_trace, request_trace
from test_scenario_answer import run_traces

from llmtrace.errors import UserError
from llmtrace.scenarios.prefix_cache import SCENARIO
from llmtrace.scenarios.prefix_cache.workload import smoke_requests
from llmtrace.scenarios.runs import latest_run, load_run, trace_ids, wait_for
from llmtrace.scenarios.smoke import verify
from llmtrace.stack import Stack
from llmtrace.traces import tempo
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TraceSummary, search_all

UP = Stack.model_validate(STACK)


@dataclass
class Summary:
    trace_id: str
    start_ns: int


@dataclass
class MemoryStore:
    """Answers the two TraceQL shapes that runs.py asks; a trace appears after ``delay`` reads."""

    traces: dict[str, Trace]
    delay: int = 0
    reads: int = 0
    asked: list[str] = field(default_factory=list)

    def trace(self, trace_id: str) -> Trace | None:
        self.reads += 1
        return self.traces.get(trace_id) if self.reads > self.delay else None

    def search(self, traceql: str, **_: Any) -> list[Summary]:
        self.asked.append(traceql)
        name = re.search(r'name = "([^"]+)"', traceql)
        wanted = re.findall(r'span\.([\w.]+) = "([^"]+)"', traceql)
        return [
            Summary(t.trace_id, t.spans[0].start_ns)
            for t in self.traces.values()
            if any(
                (name is None or s.name == name[1]) and all(s.attributes.get(k) == v for k, v in wanted)
                for s in t.spans
            )
        ]


def store(*traces: Trace, delay: int = 0) -> Any:
    return MemoryStore({t.trace_id: t for t in traces}, delay)


def test_the_latest_run_is_found_through_its_traces() -> None:
    full = store(*run_traces(300, blocks=1))
    assert latest_run(full, "prefix-cache") == "run-1"
    assert len(list(load_run(full, "run-1"))) == 26


def test_a_store_without_a_run_says_what_to_do() -> None:
    with pytest.raises(UserError, match="run `llmtrace run prefix-cache` first"):
        latest_run(store(request_trace()), "prefix-cache")
    with pytest.raises(UserError, match="no traces of run run-7"):
        load_run(store(request_trace()), "run-7")


@pytest.mark.parametrize("run_id", ["", 'a" || true', "run}"])
def test_a_run_id_is_never_taken_as_a_query(run_id: str) -> None:
    with pytest.raises(UserError, match="is no run id"):
        trace_ids(store(), run_id)


def test_waiting_ends_when_all_is_there_or_the_time_is_up() -> None:
    trace = request_trace()
    late = store(trace, delay=2)
    assert wait_for(late, [trace.trace_id], lambda t: True, 5)[trace.trace_id] is trace
    assert late.reads == 3
    assert wait_for(store(), ["f" * 32], lambda t: True, 0.1) == {"f" * 32: None}


def test_the_smoke_test_passes_good_traces_and_names_a_silent_component() -> None:
    good, other = request_trace(1), request_trace(2, arm="random")
    sent = {good.trace_id: "prefix-aware", other.trace_id: "random"}
    assert verify(store(good, other), sent, SCENARIO, UP, timeout_s=1).ok
    mute = Trace(other.trace_id, tuple(s for s in other.spans if s.service != "vllm"))
    result = verify(store(good, mute), sent, SCENARIO, UP, timeout_s=0.1)
    assert not result.ok
    assert [[p.component for p in t.problems] for t in result.traces] == [[], ["vllm"]]
    assert "--otlp-traces-endpoint" in result.traces[1].problems[0].hint


def test_a_trace_that_never_came_names_the_collector() -> None:
    result = verify(store(), {"f" * 32: "random"}, SCENARIO, UP, timeout_s=0.1)
    assert {p.component for p in result.traces[0].problems} == {"collector"}


def test_the_smoke_requests_differ() -> None:
    requests = smoke_requests()
    assert len({r.pair_id for r in requests}) == len(requests) == 2
    assert len({r.tenant for r in requests}) == 2


def test_block_traces_are_not_requests() -> None:
    assert latest_run(store(block_trace(9, "random", 0, 1, (0, 0, 0), (0, 0, 0))), "prefix-cache") == "run-1"


@dataclass
class Searched:
    """A store that gives no more than the limit, and of spans those that are in the time."""

    starts_s: list[float]
    asked: int = 0

    def search(self, _: str, *, start_s: int, end_s: int, limit: int) -> list[TraceSummary]:
        self.asked += 1
        found = [
            TraceSummary(f"{n:032x}", "", "", int(at * 1e9), 0, 1)
            for n, at in enumerate(self.starts_s)
            if start_s <= at < end_s + 1
        ]
        return sorted(found, key=lambda s: -s.start_ns)[:limit]


def test_more_traces_than_one_search_gives_are_found_in_parts_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempo, "PAGE", 4)
    kept: Any = Searched([n / 2 for n in range(100)])
    found = search_all(kept, "{}", start_s=0, end_s=1000)
    assert [int(s.trace_id, 16) for s in found] == list(range(99, -1, -1))
    kept.asked = 0
    assert len(search_all(kept, "{}", start_s=49, end_s=60)) == 2
    assert kept.asked == 1


def test_a_second_with_more_traces_than_a_search_gives_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempo, "PAGE", 4)
    kept: Any = Searched([10.0, 10.1, 10.2, 10.3, 11.0])
    with pytest.raises(UserError, match=r"the second 10 .* has 4 traces of {} or more"):
        search_all(kept, "{}", start_s=0, end_s=60)
