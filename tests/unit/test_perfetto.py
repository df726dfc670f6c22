from __future__ import annotations

import json
from typing import Any

from example_traces import MS, T0, changed, request_trace
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.perfetto import perfetto_json
from llmtrace.traces.model import Event, Link, Span, Trace


def events(*traces: Trace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(perfetto_json(traces))["traceEvents"]
    return found


def test_each_instance_is_a_process_and_each_span_a_slice() -> None:
    trace = request_trace()
    found = events(trace)
    names = {e["args"]["name"]: e["pid"] for e in found if e["ph"] == "M"}
    assert {"llmtrace-client", "envoy", "llm-d-epp prefix-aware", "vllm vllm-0"} <= set(names)
    slices = [e for e in found if e["ph"] == "X"]
    assert len(slices) == len(trace.spans)
    (server,) = [e for e in slices if e["name"] == "llm_request"]
    span = trace.named("llm_request")[0]
    assert server["pid"] == names["vllm vllm-0"]
    assert server["ts"] == span.start_ns / 1e3
    assert abs(server["dur"] - span.duration_ms * 1e3) < 1e-3


def test_links_and_remote_parents_are_flows() -> None:
    other = request_trace(2, start_ms=10)
    link = Link(other.trace_id, other.spans[0].span_id)
    found = events(changed(request_trace(1), "llm_request", links=(link,)), other)
    starts = [e for e in found if e["ph"] == "s"]
    ends = [e for e in found if e["ph"] == "f"]
    assert [e["id"] for e in starts] == [e["id"] for e in ends]
    assert [e["name"] for e in starts].count("link") == 1
    assert [e["name"] for e in starts].count("parent") >= 6


def test_a_link_to_an_unknown_trace_is_left_out() -> None:
    found = events(changed(request_trace(1), "llm_request", links=(Link("f" * 32, "f" * 16),)))
    assert not [e for e in found if e["name"] == "link"]


def test_events_are_instants() -> None:
    trace = changed(request_trace(), "chat smol", events=(Event("first_token", T0 + 5 * MS),))
    (instant,) = [e for e in events(trace) if e["ph"] == "i"]
    assert (instant["name"], instant["ts"]) == ("first_token", (T0 + 5 * MS) / 1e3)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
def test_slices_of_a_thread_nest(times: list[tuple[int, int]]) -> None:
    spans = tuple(
        Span("a" * 32, f"{n:016x}", None, "x", "INTERNAL", start * 1000, (start + length) * 1000)
        for n, (start, length) in enumerate(times)
    )
    slices = [e for e in events(Trace("a" * 32, spans)) if e["ph"] == "X"]
    for one in slices:
        for two in slices:
            if one is two or one["tid"] != two["tid"] or one["ts"] > two["ts"]:
                continue
            apart = one["ts"] + one["dur"] <= two["ts"]
            within = two["ts"] + two["dur"] <= one["ts"] + one["dur"]
            same_start = one["ts"] == two["ts"]
            assert apart or within or same_start
