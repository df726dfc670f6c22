"""Traces against the registry: good ones conform, and each kind of fault is found where it was put."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any, Self

import pytest
import typer
from example_traces import block_trace, changed, request_trace
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_scenario_runs import MemoryStore
from typer.testing import CliRunner

from llmtrace import cli, cli_conformance
from llmtrace.errors import UserError
from llmtrace.semconv.conformance import Fault, Finding, Report, check
from llmtrace.semconv.definitions import registry
from llmtrace.traces.model import Event, Link, Span, Trace

GOOD = request_trace()
UPSTREAM = request_trace(2, upstream=True)
BLOCK = block_trace(3, "random", 0, 4, (0, 128, 0), (300, 400, 0))
INDEX = st.integers(0, len(GOOD.spans) - 1)


def only(trace: Trace) -> Finding:
    (finding,) = check([trace]).findings
    assert finding.trace_id == trace.trace_id
    return finding


def with_span(index: int, **fields: Any) -> Trace:
    spans = list(GOOD.spans)
    spans[index] = replace(spans[index], **fields)
    return Trace(GOOD.trace_id, tuple(spans))


def index_of(name: str) -> int:
    return [s.name for s in GOOD.spans].index(name)


@pytest.mark.parametrize("trace", [GOOD, UPSTREAM, BLOCK], ids=["kit", "llm-d", "block"])
def test_good_traces_conform(trace: Trace) -> None:
    report = check([trace])
    assert report.ok, report.findings
    assert (report.traces, report.spans) == (1, len(trace.spans))


def test_the_shapes_that_a_missing_tracer_leaves_conform() -> None:
    silent = {"envoy": "2", "llm-d-epp": "3"}
    for service in silent:
        kept = [s for s in GOOD.spans if s.service != service]
        ids = {s.span_id for s in kept}
        moved = [replace(s, parent_id="1".rjust(16, "0")) if s.parent_id not in {*ids, None} else s for s in kept]
        assert check([Trace(GOOD.trace_id, tuple(moved))]).ok, service
    alone = tuple(s for s in GOOD.spans if s.service != "llmtrace-client")
    assert check([Trace(GOOD.trace_id, alone)]).ok


@given(INDEX, st.text(min_size=1, max_size=20))
def test_an_undeclared_span_is_found(index: int, name: str) -> None:
    span = GOOD.spans[index]
    if registry().span(span.service, name) is None:
        faults = {(f.fault, f.service, f.span) for f in check([with_span(index, name=name)]).findings}
        assert (Fault.SPAN, span.service, name) in faults


def test_a_span_of_an_unknown_service_is_found_once() -> None:
    foreign = replace(GOOD.spans[0], span_id="e" * 16, name="GET /", resource={"service.name": "shop"})
    root = replace(GOOD.spans[1], parent_id="e" * 16)
    finding = only(Trace(GOOD.trace_id, (foreign, root, *GOOD.spans[2:])))
    assert (finding.fault, finding.service, finding.count) == (Fault.SPAN, "shop", 1)


@given(INDEX, st.from_regex(r"[a-z]{1,6}\.[a-z_]{1,12}", fullmatch=True))
def test_an_undeclared_attribute_is_found(index: int, name: str) -> None:
    span = GOOD.spans[index]
    definition = registry().span(span.service, span.name, span.kind)
    assert definition is not None
    if name not in definition.attributes:
        finding = only(with_span(index, attributes={**span.attributes, name: 1}))
        assert (finding.fault, finding.detail, finding.span) == (Fault.ATTRIBUTE, name, definition.name)


WRONG: dict[str, list[object]] = {
    "string": [1, 1.5, True, ["a"]],
    "int": ["1", 1.5, True, [1]],
    "double": ["1", 1, True, [1.5]],
    "boolean": ["true", 1],
    "string[]": ["a", [1], ["a", 1]],
    "int[]": [1, ["a"], [1.5], [True]],
    "double[]": [1.5, [1], ["a"]],
}


@given(st.data())
def test_a_wrong_type_is_found(data: st.DataObject) -> None:
    index = data.draw(INDEX.filter(lambda i: bool(GOOD.spans[i].attributes)))
    span = GOOD.spans[index]
    name = data.draw(st.sampled_from(sorted(span.attributes)))
    definition = registry().span(span.service, span.name, span.kind)
    assert definition is not None
    type_ = definition.attributes[name].type
    value = data.draw(st.sampled_from(WRONG[type_]))
    finding = only(with_span(index, attributes={**span.attributes, name: value}))
    assert finding.fault == Fault.TYPE
    assert finding.detail.startswith(f"{name}: ")
    assert finding.detail.endswith(f"where {type_} is declared")


def test_a_value_that_is_not_allowed_is_found_and_cut() -> None:
    finding = only(changed(GOOD, "chat smol", {"llmtrace.scenario.arm": "x" * 100}))
    assert finding.fault == Fault.VALUE
    assert "where prefix-aware or random" in finding.detail
    assert "x" * 40 not in finding.detail


def needed(span: Span) -> list[str]:
    definition = registry().span(span.service, span.name, span.kind)
    assert definition is not None
    return sorted(a.id for a in definition.attributes.values() if a.level == "required" or a.unless_error)


@given(st.data())
def test_a_missing_attribute_is_found(data: st.DataObject) -> None:
    index = data.draw(INDEX.filter(lambda i: bool(needed(GOOD.spans[i]))))
    span = GOOD.spans[index]
    name = data.draw(st.sampled_from(needed(span)))
    finding = only(with_span(index, attributes={k: v for k, v in span.attributes.items() if k != name}))
    assert (finding.fault, finding.detail) == (Fault.MISSING, name)


def test_what_a_failed_request_cannot_have_is_not_missed() -> None:
    gone = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "llmtrace.client.ttft_ms")
    client = GOOD.spans[0]
    kept = {k: v for k, v in client.attributes.items() if k not in gone}
    assert {f.detail for f in check([with_span(0, attributes=kept)]).findings} == set(gone)
    failed = with_span(0, attributes={**kept, "error.type": "TimeoutError"}, status="ERROR")
    assert check([failed]).ok


def test_a_wrong_kind_is_found() -> None:
    finding = only(changed(GOOD, "llm_request", kind="INTERNAL"))
    assert (finding.fault, finding.detail) == (Fault.KIND, "INTERNAL where SERVER is declared")


def test_events_are_checked() -> None:
    exception = Event("exception", 0, {"exception.type": "E", "exception.message": "m"})
    assert check([changed(GOOD, "chat smol", events=(Event("first_token", 0), exception))]).ok
    unknown = only(changed(GOOD, "chat smol", events=(Event("last_token", 0),)))
    assert (unknown.fault, unknown.detail) == (Fault.EVENT, "last_token")
    bare = only(changed(GOOD, "gateway.request", events=(replace(exception, attributes={}),)))
    assert (bare.fault, bare.detail) == (Fault.MISSING, "event exception: exception.type")


@given(INDEX, INDEX)
def test_a_parent_that_is_not_declared_is_found(index: int, other: int) -> None:
    span, parent = GOOD.spans[index], GOOD.spans[other]
    definition = registry().span(span.service, span.name, span.kind)
    above = registry().span(parent.service, parent.name, parent.kind)
    assert definition is not None
    assert above is not None
    report = check([with_span(index, parent_id=parent.span_id)])
    assert report.ok == (above.id in definition.parents)
    assert {f.fault for f in report.findings} <= {Fault.PARENT}


@pytest.mark.parametrize("parent_id", [None, "f" * 16], ids=["none", "absent"])
def test_a_span_without_its_parent_is_found_unless_its_parent_may_be_elsewhere(parent_id: str | None) -> None:
    for index, span in enumerate(GOOD.spans[1:], start=1):
        definition = registry().span(span.service, span.name, span.kind)
        assert definition is not None
        report = check([with_span(index, parent_id=parent_id)])
        assert report.ok == definition.remote_parent, span.name


def test_an_undeclared_link_is_found() -> None:
    link = Link(GOOD.trace_id, GOOD.spans[0].span_id)
    assert only(changed(GOOD, "llm_request", links=(link,))).fault == Fault.LINK


def test_a_declared_link_must_lead_to_the_declared_span() -> None:
    declared = registry()
    server = replace(declared.spans["span.vllm.llm_request"], links=("span.llmtrace.client.chat",))
    linked = replace(declared, spans={**declared.spans, server.id: server})
    elsewhere = Link("f" * 32, "f" * 16)
    right, wrong = (Link(GOOD.trace_id, GOOD.spans[i].span_id) for i in (0, 1))
    assert check([changed(GOOD, "llm_request", links=(right, elsewhere))], linked).ok
    (finding,) = check([changed(GOOD, "llm_request", links=(wrong,))], linked).findings
    assert finding.detail == "it links to 'ingress', not to chat *"


def test_findings_are_counted_and_the_worst_kind_comes_first() -> None:
    bad = [changed(request_trace(n), "pick_endpoints", {"mine": 1}) for n in range(1, 4)]
    odd = changed(request_trace(9), "filter_endpoints", name="filter")
    report = check([*bad, odd])
    assert [(f.fault, f.count) for f in report.findings] == [(Fault.SPAN, 1), (Fault.ATTRIBUTE, 3)]
    assert report.findings[1].trace_id == bad[0].trace_id
    assert report.traces == 4


# The command.

APP = typer.Typer()
cli_conformance.mount(APP)
APP.command("other")(lambda: None)


class Store(MemoryStore):
    base_url = "http://store"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def invoke(monkeypatch: pytest.MonkeyPatch, traces: list[Trace], *arguments: str) -> tuple[int, str]:
    kept = Store({t.trace_id: t for t in traces})
    monkeypatch.setattr(cli_conformance, "TempoClient", lambda url: kept)
    result = CliRunner().invoke(APP, ["conformance", "--store", "http://x", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


def aged(trace: Trace, seconds: float) -> Trace:
    """The trace with its last span ending this many seconds ago."""
    shift = int((time.time() - seconds) * 1e9) - max(s.end_ns for s in trace.spans)
    spans = (replace(s, start_ns=s.start_ns + shift, end_ns=s.end_ns + shift) for s in trace.spans)
    return Trace(trace.trace_id, tuple(spans))


OLD = aged(GOOD, 600)
BAD = aged(changed(UPSTREAM, "pick_endpoints", {"mine": 1}), 600)


def test_the_command_passes_good_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = invoke(monkeypatch, [OLD])
    assert (code, output.strip()) == (0, "1 traces, 15 spans: all as declared")


def test_the_command_fails_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = invoke(monkeypatch, [OLD, BAD])
    assert code == 1
    for word in ("undeclared attribute", "pick_endpoints", "mine", BAD.trace_id):
        assert word in output


def test_the_command_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = invoke(monkeypatch, [BAD], "--json")
    assert code == 1
    assert Report.model_validate(json.loads(output)).findings == check([BAD]).findings


def test_traces_that_may_not_be_complete_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    half: tuple[Span, ...] = aged(request_trace(5), 1).spans[1:-1]
    code, output = invoke(monkeypatch, [OLD, Trace(half[0].trace_id, half)])
    assert code == 0
    assert "1 traces are so new" in output


def test_a_limit_that_was_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--limit" in invoke(monkeypatch, [OLD], "--limit", "1")[1]


@pytest.mark.parametrize("since", ["", "h", "1", "1w", "-1h", "0m", "1.5h"])
def test_a_bad_duration_gives_one_sentence(monkeypatch: pytest.MonkeyPatch, since: str) -> None:
    with pytest.raises(UserError, match="is no duration"):
        invoke(monkeypatch, [OLD], f"--since={since}")


def test_durations() -> None:
    assert [cli_conformance.duration_s(t) for t in ("90s", "30m", "1h", " 2d ")] == [90, 1800, 3600, 172800]


def test_a_check_of_nothing_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no finished traces"):
        invoke(monkeypatch, [])


def test_the_command_is_in_the_command_line() -> None:
    assert "conformance" in CliRunner().invoke(cli.app, ["--help"]).output


def test_names_with_markup_are_shown_as_they_are() -> None:
    odd = changed(GOOD, "filter_endpoints", name="[bold]x[/bold]")
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(cli_conformance.conformance_text(check([odd])))
    assert "[bold]x[/bold]" in captured.get()
