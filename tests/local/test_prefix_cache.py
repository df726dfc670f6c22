"""The prefix-cache scenario against the real local stack: vLLM, Envoy, pickers, collector, store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import llmtrace

from llmtrace.scenarios.expectation import verify_trace
from llmtrace.scenarios.prefix_cache import EXPECTATION
from llmtrace.stack import Stack
from llmtrace.traces.tempo import TempoClient

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack.load()


@pytest.fixture(scope="module")
def answered(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One small run and its answer."""
    ran = llmtrace("run", "prefix-cache", "--blocks", "2", "--conversations", "2", "--turns", "2", "--seed", "11")
    assert ran.returncode == 0, ran.stderr
    report = tmp_path_factory.mktemp("report") / "report.html"
    done = llmtrace("answer", "prefix-cache", "--json", "--html", str(report))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, report


def test_verify_passes(stack: Stack) -> None:
    done = llmtrace("verify", "prefix-cache", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_every_request_is_there_and_the_sources_agree(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    assert [(arm["requests"], arm["failed"]) for arm in found["arms"]] == [(32, 0), (32, 0)]
    assert [check for check in found["checks"] if check["ok"] is False] == []
    assert len(found["pairs"]) == 32


def test_prefix_aware_routing_hits_the_cache_more(answered: tuple[dict[str, Any], Path]) -> None:
    aware, other = answered[0]["arms"]
    assert aware["cached_tokens"] > other["cached_tokens"] > 0
    assert aware["missed_decisions"] < other["missed_decisions"]


def test_missed_decisions_can_be_followed_to_their_traces(
    stack: Stack, answered: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    worst = answered[0]["missed"][0]
    trace = TempoClient(stack.store).trace(worst["trace_id"])
    assert trace is not None
    assert verify_trace(trace, EXPECTATION) == []
    assert worst["avoidable_tokens"] >= answered[0]["kv_block_size"]
    exported = tmp_path / "trace.json"
    done = llmtrace("trace", worst["trace_id"], "--perfetto", str(exported))
    assert done.returncode == 0, done.stderr
    assert "llm_request" in done.stdout
    slices = [e for e in json.loads(exported.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == len(trace.spans)


def test_no_prompt_text_is_in_any_trace(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    trace_id = answered[0]["pairs"][0]["candidate_trace_id"]
    response = httpx.get(f"{stack.store}/api/v2/traces/{trace_id}", timeout=10)
    assert response.status_code == 200
    for word in (b"Skerry", b"Fennel", b"Corvid", b"Tanner"):
        assert word not in response.content


def test_the_report_is_written(answered: tuple[dict[str, Any], Path]) -> None:
    page = answered[1].read_text()
    assert answered[0]["run_id"] in page


def test_an_unknown_trace_and_scenario_give_one_sentence(stack: Stack) -> None:
    for arguments in (("trace", "f" * 32), ("trace", "nonsense"), ("run", "no-such-scenario")):
        done = llmtrace(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("llmtrace: ")
