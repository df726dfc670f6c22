"""The autoscaling scenario against the real local stack: one server, a burst, up to three servers, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import llmtrace
from loopback import until

from llmtrace.deploy import health
from llmtrace.deploy.supervisor import DOWN
from llmtrace.scenarios.autoscaling import SCENARIO
from llmtrace.scenarios.autoscaling.arms import CHATS, DRIVING, REPORTS
from llmtrace.scenarios.runs import load_run
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Span, Trace
from llmtrace.traces.tempo import TempoClient

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

CALM_S = 120.0
"""For the last replica to go after the run, and for its decision's trace."""
STARTED = (a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN, a.READY_SPAN)


@pytest.fixture(scope="module")
def stack(autoscaling_stack: Stack) -> Stack:
    return autoscaling_stack


@pytest.fixture(scope="module")
def answered(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The scenario's run and its answer, once the stack is back at one server."""
    until(lambda: asleep(stack) == {"vllm-1", "vllm-2"}, "the calm before the run", CALM_S, poll_s=1)
    ran = llmtrace("run", SCENARIO.name, "--seed", "11")
    assert ran.returncode == 0, ran.stderr
    assert " 0 failed" in ran.stderr
    report = tmp_path_factory.mktemp("report") / "report.html"

    def back() -> dict[str, Any] | None:
        done = llmtrace("answer", SCENARIO.name, "--json", "--html", str(report))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found if found["decisions"] and found["decisions"][-1]["desired"] == 1 else None

    until(lambda: asleep(stack) == {"vllm-1", "vllm-2"}, "the end of the servers that were added", CALM_S, poll_s=1)
    found: dict[str, Any] = until(back, "the trace of the last decision", CALM_S, poll_s=2)
    return found, report


def asleep(stack: Stack) -> set[str]:
    """The model servers whose process does not run."""
    servers = {server.process for server in stack.servers}
    states = health.statuses(stack)
    return {s.component.name for s in states if s.component.name in servers and s.process and s.process.state in DOWN}


def ups(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [d for d in found["decisions"] if d["direction"] == a.SCALE_UP]


def stored(stack: Stack, trace_id: str) -> Trace:
    found = TempoClient(stack.store).trace(trace_id)
    assert found is not None, trace_id
    return found


def replicas(trace: Trace, outcome: str) -> list[tuple[Span, list[Span]]]:
    """The replicas of a decision's trace that ended so, with their phases."""
    return [
        (span, sorted(trace.children(span), key=lambda s: s.start_ns))
        for span in trace.named(a.REPLICA_SPAN)
        if span.attributes[a.OUTCOME] == outcome
    ]


def test_servers_beyond_the_fewest_may_be_stopped(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    done = llmtrace("status", "--json")
    assert done.returncode == 0, done.stdout
    states = {row["name"]: row["process"] for row in json.loads(done.stdout)}
    assert {name: states[name] for name in ("vllm-0", "vllm-1", "vllm-2", "autoscale")} == {
        "vllm-0": "RUNNING",
        "vllm-1": "STOPPED",
        "vllm-2": "STOPPED",
        "autoscale": "RUNNING",
    }


def test_the_burst_adds_servers_and_the_calm_takes_them_away(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    numbers = [d["desired"] for d in found["decisions"]]
    assert max(numbers) == 3
    assert numbers[-1] == 1
    assert found["decisions"][0]["current"] == 1
    assert {d["direction"] for d in found["decisions"]} >= {a.SCALE_UP, a.SCALE_DOWN}
    assert ups(found)[0]["metric"] == "epp-queue-size"
    assert ups(found)[0]["value"] > ups(found)[0]["target"]
    assert max(m["ready"] for m in found["timeline"]) == 3
    assert max(m["waiting"] for m in found["timeline"]) > 0
    assert all(d["verdict"] == "harmless" for d in found["decisions"] if d["direction"] == a.SCALE_DOWN)


def test_the_sources_agree(answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    assert [c for c in found["checks"] if c["ok"] is not True] == []


def test_what_drove_the_scaler_is_found(answered: tuple[dict[str, Any], Path]) -> None:
    """Chats wait in the same queue, and no decision is due to them."""
    found, _ = answered
    kinds = {k["kind"]: k for k in found["kinds"]}
    assert kinds[CHATS]["wait_user_s"] > 0
    assert (kinds[CHATS]["drivers"], kinds[REPORTS]["drivers"]) == (0, found["attribution"]["attributed"])
    assert found["attribution"]["attributed"] >= 3
    assert found["attribution"]["precision"] == 1.0
    assert found["attribution"]["recall"] == 1.0


def test_a_decision_and_its_requests_lead_to_each_other(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    decision = ups(found)[0]
    root = stored(stack, decision["trace_id"]).roots[0]
    linked = {link.trace_id for link in root.links}
    assert len(linked) == len(root.links) == root.attributes[a.DRIVERS_LINKED] > 0
    led = {trace_id for trace_id, ids in found["led_to"].items() if decision["id"] in ids}
    assert linked <= led
    assert len(led) == decision["drivers"] == root.attributes[a.DRIVERS_FOUND]
    for trace_id in sorted(linked)[:3]:
        request = stored(stack, trace_id)
        (queue,) = request.named(a.FLOW_SPAN)
        assert queue.start_ns < root.start_ns
        assert queue.end_ns > root.start_ns - decision_window_ns(root)
        assert request.named(a.ORCHESTRATION_SPAN)[0].attributes[a.TARGET_MODEL] == stack.model + DRIVING
    shown = llmtrace("trace", min(linked))
    assert shown.returncode == 0, shown.stderr
    assert f"drove the decision {decision['trace_id']}, which links to it" in shown.stdout


def decision_window_ns(root: Span) -> int:
    return int(float(str(root.attributes[a.SCALE_WINDOW])) * 1e6)


def test_a_new_server_is_followed_to_its_first_token(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    found, _ = answered
    decision = ups(found)[0]
    trace = stored(stack, decision["trace_id"])
    served = replicas(trace, a.OUTCOME_SERVED)
    assert served
    for span, phases in served:
        assert [p.name for p in phases] == [*STARTED, a.FIRST_REQUEST_SPAN]
        assert [p.start_ns for p in phases] == [span.start_ns, *(p.end_ns for p in phases[:-1])]
        assert 0 <= span.end_ns - phases[-1].end_ns < 10**6
        # vLLM's own spans of its start say how long it loaded the model.
        assert [p.attributes[a.PHASE_SOURCE] for p in phases[:2]] == [a.SOURCE_SPANS] * 2
        assert all(p.duration_ms > 0 for p in phases[:2])
    first_ns = min(phases[-1].end_ns for _, phases in served)
    assert decision["useful_s"] == pytest.approx((first_ns - trace.roots[0].start_ns) / 1e9)
    assert decision["wait_user_s"] > 0
    assert decision["wait_token_s"] > decision["wait_user_s"]


def test_the_added_servers_really_served(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    requests = load_run(TempoClient(stack.store), answered[0]["run_id"])
    assert {s.instance for t in requests for s in t.named(a.SERVER_SPAN)} == {"vllm-0", "vllm-1", "vllm-2"}


def test_drained_servers_lost_no_request(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    downs = [d for d in answered[0]["decisions"] if d["direction"] == a.SCALE_DOWN]
    drained = [r for d in downs for r in replicas(stored(stack, d["trace_id"]), a.OUTCOME_DRAINED)]
    assert {span.attributes[a.REPLICA] for span, _ in drained} == {"vllm-1", "vllm-2"}
    for _, phases in drained:
        assert [p.name for p in phases] == [a.DRAIN_SPAN]
        assert phases[0].attributes[a.DRAIN_CUT] == 0


def test_a_scaler_that_may_not_have_more_says_so(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    """Many more reports wait than the three servers that there may be."""
    limited = [d for d in answered[0]["decisions"] if d["limit"] == a.LIMITED_MAX]
    assert limited
    for decision in limited:
        told = stored(stack, decision["trace_id"]).roots[0].attributes
        assert decision["desired"] == told[a.REPLICAS_MAX] == 3
        assert int(str(told[a.REPLICAS_RECOMMENDED])) > 3
    done = llmtrace("answer", SCENARIO.name)
    assert done.returncode == 0, done.stderr
    assert "limited" in done.stdout


def test_verify_passes_for_requests_and_decisions(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    done = llmtrace("verify", SCENARIO.name, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert {t["trace_id"] for t in found["traces"]} >= {d["trace_id"] for d in answered[0]["decisions"]}


def test_a_decision_as_a_tree(answered: tuple[dict[str, Any], Path]) -> None:
    done = llmtrace("trace", ups(answered[0])[0]["trace_id"])
    assert done.returncode == 0, done.stderr
    for words in (a.APPLY_SPAN, a.MODEL_LOAD_SPAN, a.FIRST_REQUEST_SPAN, "epp-queue-size above target", "link to"):
        assert words in done.stdout


def test_no_prompt_text_is_in_any_trace(stack: Stack, answered: tuple[dict[str, Any], Path]) -> None:
    trace_id = next(iter(answered[0]["led_to"]))
    text = repr(stored(stack, trace_id))
    for word in ("Skerry", "Fennel", "Corvid", "Tanner", "Write a report"):
        assert word not in text


def test_the_report_is_written(answered: tuple[dict[str, Any], Path]) -> None:
    page = answered[1].read_text()
    assert answered[0]["run_id"] in page
    assert ups(answered[0])[0]["trace_id"] in page
