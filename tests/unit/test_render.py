from __future__ import annotations

import io
from dataclasses import replace

from example_pd_traces import pd_trace
from example_traces import MS, T0, changed, request_trace
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llmtrace.render import bar, format_value, tree
from llmtrace.traces.model import Event, Link, Span, Trace


def text(trace: Trace, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(tree(trace))
    return out.getvalue()


def folded(trace: Trace) -> str:
    """The output without its spaces, so that it does not matter where cells were folded."""
    return "".join(text(trace, 300).split())


def test_the_tree_shows_every_span_indented_with_its_sender() -> None:
    lines = text(request_trace(cached=1280)).splitlines()
    assert "15 spans" in lines[0]
    line = {
        name: next(x for x in lines if name in x)
        for name in ("chat smol", "ingress", "gateway.request ", "llm_request")
    }
    assert line["chat smol"].startswith("chat smol")
    assert line["gateway.request "].index("gateway") == 2
    assert "vllm/vllm-0" in line["llm_request"]
    assert "prompt 1500" in line["llm_request"]
    assert "ttft94.0ms" in folded(request_trace())
    scorer = next(x for x in lines if "prefix-cache-scorer" in x)
    assert "vllm-0=1 vllm-1=1 vllm-2=1" in scorer
    assert all("━" in x for x in line.values())


def test_the_tree_shows_the_choice_the_legs_and_the_kv_in_short() -> None:
    shown = folded(pd_trace(prompt=1640, cached=32))
    for words in (
        "decision split split True reason uncached_at_or_above_threshold prompt 1640 cached 32 threshold 512",
        "decode default/decode-0 waiting 1 prefill default/prefill-0 waiting 0",
        "split True prefill at 127.0.0.1:8101",
        "to http://127.0.0.1:8101/v1/chat/completions status 200",
        "size 37.6 MB blocks 51 tokens 1608 transfer ms 12.5 from engine engine-prefill-0",
        "prompt 1640 cached 32 loaded 1608 computed 0 chunks 1",
        "output 16 tpot ms",
    ):
        assert words.replace(" ", "") in shown, words
    assert "step complete_decode-only".replace(" ", "") in folded(pd_trace(split=False))


def test_errors_events_links_and_orphans_are_marked() -> None:
    trace = changed(request_trace(), "chat smol", status="ERROR", status_message="TimeoutError")
    trace = changed(
        trace, "chat smol", events=(Event("first_token", T0 + 100 * MS),), links=(Link("a" * 32, "b" * 16),)
    )
    trace = Trace(trace.trace_id, tuple(s for s in trace.spans if s.name != "ingress"))
    shown = text(trace, 600)
    assert "error: TimeoutError" in shown
    assert "event first_token at 100.0 ms" in shown
    assert f"link to {'a' * 32}:{'b' * 16}" in shown
    assert "orphan: parent 0000000000000002 is not in the trace" in shown
    assert "1 orphans" in shown


def test_of_many_links_some_are_shown() -> None:
    links = tuple(Link(f"{n:032x}", "b" * 16) for n in range(1, 8))
    shown = text(changed(request_trace(), "ingress", links=links), 600)
    assert shown.count("link to") == 4
    assert "and 3 more links" in shown


def test_markup_in_a_span_name_is_text() -> None:
    assert "[red]x[/nope]" in text(changed(request_trace(), "ingress", name="[red]x[/nope]"), 300)


def test_an_empty_trace() -> None:
    assert "0 spans" in text(Trace("a" * 32, ()))


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 80))
def test_bars_fit(start: int, length: int, total: int, width: int) -> None:
    span = Span("a" * 32, "b" * 16, None, "x", "INTERNAL", min(start, total), min(start, total) + length)
    drawn = bar(span, 0, max(total, span.end_ns), width)
    assert len(drawn) == width
    assert "━" in drawn


def test_values_are_for_people() -> None:
    assert format_value("gen_ai.latency.e2e", 0.25) == "250.0 ms"
    assert format_value("x", [1.0, 0.333333]) == "1, 0.3333"
    assert format_value("x", 12345.6) == "12346"
    sizes = {47_185_920: "47.2 MB", 13_400: "13 kB", 20: "20 B"}
    assert {size: format_value("llmtrace.kv_load.bytes", size) for size in sizes} == sizes


def test_unknown_spans_show_their_first_attributes() -> None:
    odd = replace(request_trace().spans[0], name="odd", attributes={f"k{i}": i for i in range(9)})
    shown = text(Trace(odd.trace_id, (odd,)))
    assert "k5 5" in shown
    assert "k6" not in shown
