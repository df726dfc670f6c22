"""The wide-ep scenario against the real local stack: one server of two ranks, each step of which is traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import llmtrace

from llmtrace.scenarios.wide_ep import SCENARIO
from llmtrace.scenarios.wide_ep.workload import SMOKE_REQUESTS, WideEpWorkload
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.tempo import TempoClient

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
RANKS = 2


@pytest.fixture(scope="module")
def stack(wide_ep_stack: Stack) -> Stack:
    return wide_ep_stack


@pytest.fixture(scope="module")
def answered(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run and its answer."""
    ran = llmtrace("run", SCENARIO.name, "--seed", "11")
    assert ran.returncode == 0, ran.stderr
    assert " 0 failed" in ran.stderr
    report = tmp_path_factory.mktemp("report") / "report.html"
    done = llmtrace("answer", SCENARIO.name, "--json", "--html", str(report))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, report


def test_verify_passes(stack: Stack) -> None:
    done = llmtrace("verify", SCENARIO.name, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], len(found["traces"])) == (True, SMOKE_REQUESTS)


def test_the_sources_agree(answered: tuple[dict[str, Any], Path]) -> None:
    assert [check for check in answered[0]["checks"] if check["ok"] is not True] == []


def test_every_request_has_its_steps_and_both_ranks_had_work(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    assert len(found["requests"]) == WideEpWorkload().size
    assert {request["rank"] for request in found["requests"]} == set(range(RANKS))
    for request in found["requests"]:
        assert request["prefill_steps"] >= 1
        assert request["decode_steps"] >= 1
        assert sum(request["ms"]) == pytest.approx(request["step_ms"])


def test_time_experts_and_stragglers(answered: tuple[dict[str, Any], Path]) -> None:
    steps = answered[0]["steps"]
    assert (steps["ranks"], steps["partial"]) == (RANKS, 0)
    for share in steps["by_rank"]:
        assert sum(share["ms"]) == pytest.approx(share["step_ms"])
        assert all(ms > 0 for ms in share["ms"][:4])
    assert {straggler["rank"] for straggler in steps["stragglers"]} <= set(range(RANKS))
    assert steps["experts"]["experts"] == len(steps["sent"][0]) == 8
    assert steps["experts"]["tokens"] == sum(map(sum, steps["sent"]))
    assert all(any(row) for row in steps["sent"])


def test_a_request_and_its_steps_lead_to_each_other(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    store = TempoClient(stack.store)
    request = store.trace(answered[0]["requests"][0]["trace_id"])
    assert request is not None
    (decode,) = request.named(a.DECODE_SPAN)
    (server,) = request.named(a.SERVER_SPAN)
    for link in decode.links[:3]:
        step = store.trace(link.trace_id)
        assert step is not None
        assert len(step.named(a.STEP_SPAN)) == RANKS
        callers = {(c.trace_id, c.span_id) for c in step.by_id[link.span_id].links}
        assert (request.trace_id, server.parent_id) in callers


def test_a_step_as_a_tree(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    request = TempoClient(stack.store).trace(answered[0]["requests"][0]["trace_id"])
    assert request is not None
    done = llmtrace("trace", request.named(a.DECODE_SPAN)[0].links[0].trace_id)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(a.STEP_SPAN) == RANKS
    shown = "".join(done.stdout.split())
    for words in ("rank0", "rank1", "dispatchms", "linkto"):
        assert words in shown


def test_no_prompt_text_is_in_any_trace(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    request = TempoClient(stack.store).trace(answered[0]["requests"][0]["trace_id"])
    text = repr(request)
    for word in ("Skerry", "Fennel", "Corvid", "Tanner"):
        assert word not in text


def test_the_report_is_written(answered: tuple[dict[str, Any], Path]) -> None:
    page = answered[1].read_text()
    assert answered[0]["run_id"] in page
    assert "Tokens that each rank sent to each expert" in page
