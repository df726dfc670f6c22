"""The commands answer and trace on a store kept in memory, and their sentences on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from example_pd_traces import pd_run
from example_stack import STACK
from example_traces import request_trace
from test_scenario_answer import run_traces
from test_scenario_runs import store
from typer.testing import CliRunner

from llmtrace import cli_scenarios
from llmtrace.errors import UserError
from llmtrace.stack import Stack

TRACE = request_trace(77, cached=1280, run_id="run-0")
APP = typer.Typer()
for command in (cli_scenarios.run, cli_scenarios.answer, cli_scenarios.verify, cli_scenarios.trace):
    APP.command()(command)


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(*run_traces(300, blocks=2))
    kept.traces[TRACE.trace_id] = TRACE
    monkeypatch.setattr(cli_scenarios, "TempoClient", lambda url: kept)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(APP, [*arguments, "--store", "http://127.0.0.1:9"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_answer_as_text_says_everything() -> None:
    shown = invoke("answer", "prefix-cache")
    for word in (
        "run run-1",
        "hit share",
        "vllm-2",
        "improves TTFT",
        "missed a warmer endpoint",
        "next: llmtrace trace",
    ):
        assert word in shown
    assert shown.count("yes ") == 4


def test_the_other_scenario_answers_by_the_same_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = store(*pd_run(lambda uncached, split: 300.0 + uncached / 2, blocks=2, each=2))
    monkeypatch.setattr(cli_scenarios, "TempoClient", lambda url: kept)
    shown = invoke("answer", "pd-disaggregation")
    for word in (
        "run run-1",
        "How was each request served",
        "prefill-0",
        "Did the choices pay off",
        "next: llmtrace trace",
    ):
        assert word in shown
    page = tmp_path / "report.html"
    found: dict[str, Any] = json.loads(invoke("answer", "pd-disaggregation", "--json", "--html", str(page)))
    assert found["scenario"] == "pd-disaggregation"
    assert found["requests"][0]["trace_id"] in page.read_text()


def test_a_stack_for_another_scenario_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = tmp_path / "stack.json"
    monkeypatch.setenv("LLMTRACE_STACK", str(state))
    Stack.model_validate({**STACK, "scenario": "pd-disaggregation"}).save(state)
    sentence = "set up for pd-disaggregation, not for prefix-cache: run `llmtrace up -e scenario=prefix-cache`"
    for command in ("run", "verify"):
        with pytest.raises(UserError, match=sentence):
            invoke(command, "prefix-cache")
    Stack.model_validate(STACK).save(state)
    with pytest.raises(UserError, match="llmtrace up -e scenario=pd-disaggregation"):
        invoke("run", "pd-disaggregation")


def test_the_answer_as_json_and_html(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found: dict[str, Any] = json.loads(invoke("answer", "--json", "--run", "run-1", "--html", str(page)))
    assert found["comparison"]["conclusion"] == "improvement"
    assert "<!doctype html>" in page.read_text()


def test_a_trace_as_tree_json_and_for_perfetto(tmp_path: Path) -> None:
    exported = tmp_path / "trace.json"
    assert "gateway.request_orchestration" in invoke("trace", TRACE.trace_id, "--perfetto", str(exported))
    assert json.loads(exported.read_text())["traceEvents"]
    assert len(json.loads(invoke("trace", TRACE.trace_id.upper(), "--json"))["spans"]) == 15


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("trace", "xyz"), "'xyz' is no trace id"),
        (("trace", "e" * 32), "the store has no trace"),
        (("answer", "prefix-cash"), "there is no scenario 'prefix-cash'"),
        (("answer", "--run", "run-8"), "no traces of run run-8"),
        (("trace", TRACE.trace_id, "--perfetto", "/proc/none/x.json"), "/proc/none/x.json cannot be written"),
    ],
)
def test_bad_input_gives_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        invoke(*arguments)


def test_without_a_stack_the_sentence_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMTRACE_STACK", str(tmp_path / "none.json"))
    for name in ("run", "verify", "answer"):
        with pytest.raises(UserError, match="llmtrace up"):
            CliRunner().invoke(APP, [name], catch_exceptions=False)
