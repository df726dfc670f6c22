"""The pd-disaggregation scenario against the real local stack: NIXL, sidecars, three gateways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import llmtrace

from llmtrace.scenarios.pd_disaggregation import SCENARIO
from llmtrace.stack import Stack
from llmtrace.traces.tempo import TempoClient

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
THRESHOLD = 512


@pytest.fixture(scope="module")
def answered(pd_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One small run and its answer."""
    ran = llmtrace("run", SCENARIO.name, "--blocks", "1", "--seed", "11")
    assert ran.returncode == 0, ran.stderr
    report = tmp_path_factory.mktemp("report") / "report.html"
    done = llmtrace("answer", SCENARIO.name, "--json", "--html", str(report))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, report


def requests(found: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [r for r in found["requests"] if r["arm"] == arm]


def test_verify_passes(pd_stack: Stack) -> None:
    done = llmtrace("verify", SCENARIO.name, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], len(found["traces"])) == (True, 9)


def test_every_request_is_there_and_the_picker_is_obeyed(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    assert [(arm["arm"], arm["requests"], arm["failed"]) for arm in found["arms"]] == [
        (arm, 20, 0) for arm in ("by-threshold", "always-split", "never-split")
    ]
    names = (
        "every request",
        "decision:",
        "prompt tokens:",
        "reason: the rule",
        "KV of split requests",
        "cached tokens: vLLM's spans and vLLM's counters",
    )
    failing = [c for c in found["checks"] if c["ok"] is not True and c["name"].startswith(names)]
    assert failing == []


def test_the_arms_choose_as_they_are_named(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    assert {r["reason"] for r in requests(found, "always-split")} == {"always"}
    assert {r["reason"] for r in requests(found, "never-split")} == {"splitting_disabled"}
    for r in requests(found, "by-threshold"):
        assert r["split"] == (r["uncached_tokens"] >= THRESHOLD), r["sentence"]
        assert r["derived"] == []
    assert {r["split"] for r in requests(found, "by-threshold")} == {True, False}


def test_long_cold_prompts_move_megabytes_of_kv(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    long = [r for r in requests(found, "by-threshold") if r["split"] and r["uncached_tokens"] > 1000]
    assert long
    for r in long:
        assert r["prefill_server"] == "prefill-0"
        assert r["kv_bytes"] > 10_000_000, r["sentence"]
        assert 0 < r["kv_wait_ms"] < r["ttft_ms"]
    assert {t["source"] for t in found["transfers"]} == {"prefill-0"}
    assert all(t["failed"] == 0 for t in found["transfers"])


def test_a_split_request_is_one_trace_over_both_servers(pd_stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    split = next(r for r in requests(answered[0], "by-threshold") if r["split"])
    trace = TempoClient(pd_stack.store).trace(split["trace_id"])
    assert trace is not None
    assert SCENARIO.further(trace, "by-threshold", pd_stack) == []
    assert {s.instance for s in trace.named("llm_request")} == {split["prefill_server"], split["decode_server"]}
    done = llmtrace("trace", split["trace_id"])
    assert done.returncode == 0, done.stderr
    for words in ("prepare_disaggregation", "forward_request", "kv_load", "decision split"):
        assert words in done.stdout


def test_no_prompt_text_is_in_any_trace(pd_stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    split = next(r for r in requests(answered[0], "by-threshold") if r["split"])
    trace = TempoClient(pd_stack.store).trace(split["trace_id"])
    text = repr(trace)
    for word in ("Skerry", "Fennel", "Corvid", "Tanner"):
        assert word not in text


def test_the_report_is_written(answered: tuple[dict[str, Any], Path]) -> None:
    page = answered[1].read_text()
    assert answered[0]["run_id"] in page


def test_another_scenario_s_commands_give_one_sentence(pd_stack: Stack) -> None:
    done = llmtrace("run", "prefix-cache")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "llmtrace up -e scenario=prefix-cache" in done.stderr
