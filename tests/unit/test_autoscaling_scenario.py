"""The autoscaling scenario's workload, how the driver sends it, and the commands on its traces."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import typer
from example_scaling import QUERY, linked
from hypothesis import given, settings
from hypothesis import strategies as st
from test_autoscaling_answer import burst
from test_scenario_driver import FakeServer, driver, exporter, server  # noqa: F401 - fixtures
from test_scenario_runs import MemoryStore
from typer.testing import CliRunner

from llmtrace import cli_scenarios
from llmtrace.errors import UserError
from llmtrace.scenarios.autoscaling.arms import CHATS, DRIVING, REPORTS
from llmtrace.scenarios.autoscaling.workload import (
    BURST_S,
    CALM_AFTER_S,
    CALM_S,
    AutoscalingWorkload,
    smoke_requests,
)
from llmtrace.scenarios.driver import Driver
from llmtrace.scenarios.expectation import Fault
from llmtrace.scenarios.workload import Chat, Request
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import demand
from llmtrace.traces.model import Trace


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 1000))
def test_calm_a_burst_calm(blocks: int, conversations: int, seed: int) -> None:
    workload = AutoscalingWorkload(blocks, conversations, 1, seed)
    chats = [c for b in range(blocks) for c in workload.chats(b)]
    assert len(chats) == workload.size
    assert workload.chats(0) == AutoscalingWorkload(blocks, conversations, 1, seed).chats(0)
    for block in range(blocks):
        times = [c.at_s for c in workload.chats(block)]
        assert times == sorted(times)
    for chat in chats:
        (request,) = chat.requests
        if request.tenant == REPORTS:
            assert CALM_S <= chat.at_s <= CALM_S + BURST_S
            assert request.model_suffix == DRIVING
        else:
            assert (request.tenant, request.model_suffix) == (CHATS, "")
            assert 0 <= chat.at_s <= CALM_S + BURST_S + CALM_AFTER_S
    assert len({c.requests[0].pair_id for c in chats}) == len(chats)


def test_the_smoke_test_has_one_of_each_kind() -> None:
    assert [r.tenant for r in smoke_requests()] == [CHATS, REPORTS]


def test_turns_are_refused() -> None:
    with pytest.raises(UserError, match="turns is 2"):
        AutoscalingWorkload(turns=2)


def test_the_scalers_query_counts_the_reports() -> None:
    model = demand(QUERY.replace("smol-reports", f"smollm2-135m{DRIVING}")).model
    assert model == "smollm2-135m" + DRIVING


class Three(AutoscalingWorkload):
    """Three requests: one at once, one after 0.2 s, one after 0.4 s to the other model."""

    @property
    def size(self) -> int:
        return 3

    def chats(self, block: int) -> list[Chat]:
        suffixes = ("", "", DRIVING)
        return [
            Chat((Request(f"r-{n}", 0, CHATS, f"c-{n}", 0, ({"role": "user", "content": "Hi"},), suffix),), 0.2 * n)
            for n, suffix in enumerate(suffixes)
        ]


async def test_the_driver_sends_at_set_times_and_to_the_named_model(
    driver: Driver,  # noqa: F811
    server: FakeServer,  # noqa: F811
    exporter: Any,  # noqa: F811
) -> None:
    driver.settings = replace(driver.settings, warmups=0, arms=driver.settings.arms[:1], concurrency=8)
    started = time.monotonic()
    await driver.run(Three())
    assert time.monotonic() - started >= 0.4
    model = driver.settings.model
    assert [body["model"] for body in server.bodies] == [model, model, model + DRIVING]
    spans = sorted((s for s in exporter.get_finished_spans() if a.PAIR_ID in s.attributes), key=lambda s: s.start_time)
    gaps = [(after.start_time - before.start_time) / 1e9 for before, after in pairwise(spans)]
    assert all(gap >= 0.15 for gap in gaps)
    assert spans[-1].attributes[a.REQUEST_MODEL] == model + DRIVING
    assert spans[-1].name == f"chat {model}{DRIVING}"


APP = typer.Typer()
APP.command()(cli_scenarios.answer)
APP.command()(cli_scenarios.verify)
APP.command()(cli_scenarios.trace)


def test_the_answer_takes_the_decisions_of_the_runs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_run(trace: Trace) -> Trace:
        spans = (
            replace(s, attributes={**s.attributes, a.RUN_ID: "run-1"}) if not s.parent_id else s for s in trace.spans
        )
        return Trace(trace.trace_id, tuple(spans))

    *requests, up, down = burst()
    kept = MemoryStore({t.trace_id: t for t in (*map(of_run, requests), up, down)})
    monkeypatch.setattr(cli_scenarios, "TempoClient", lambda url: kept)
    arguments = ["answer", "autoscaling", "--run", "run-1", "--store", "http://127.0.0.1:9"]
    result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "2 decisions: 1 up, 1 down" in result.output
    assert f"next: llmtrace trace {up.trace_id}" in result.output
    assert any(a.DECISION_SPAN in query for query in kept.asked)


def kept_in_memory(monkeypatch: pytest.MonkeyPatch, traces: list[Trace]) -> MemoryStore:
    kept = MemoryStore({t.trace_id: t for t in traces})
    monkeypatch.setattr(cli_scenarios, "TempoClient", lambda url: kept)
    return kept


def invoked(*arguments: str) -> Any:
    return CliRunner().invoke(APP, [*arguments, "--store", "http://127.0.0.1:9"], catch_exceptions=False)


def without_client(trace: Trace) -> Trace:
    """As somebody else sent it."""
    first, *rest = trace.spans
    return Trace(trace.trace_id, tuple(replace(s, parent_id=None) if s.parent_id == first.span_id else s for s in rest))


def test_requests_of_anybody_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    *requests, up, down = burst()
    kept = kept_in_memory(monkeypatch, [*map(without_client, requests), up, down])
    answered = invoked("answer", "autoscaling", "--since", "2h", "--until", "1m")
    assert answered.exit_code == 0, answered.output
    assert "2 decisions: 1 up, 1 down" in answered.output
    assert "model smol, smol-reports" in answered.output
    assert "(not of the workload)" in answered.output
    assert any(a.GATEWAY_SPAN in query for query in kept.asked)
    verified = invoked("verify", "autoscaling", "--since", "2027-01-15T08:00:00+00:00", "--until", "2027-01-15T09:00Z")
    assert verified.exit_code == 0, verified.output
    assert f"{len(requests) + 2} traces, each one complete tree" in verified.output


def test_a_request_tells_the_decisions_that_it_led_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six reports drove the first decision, of which it links to one; a chat drove none."""
    *requests, up, down = burst()
    kept_in_memory(monkeypatch, [*requests, linked(up, requests[0].trace_id), down])
    told = [invoked("trace", requests[n].trace_id).output for n in (0, 1, 6)]
    assert f"drove the decision {up.trace_id}, which links to it: 1 > 3 replicas, epp-queue-size above" in told[0]
    assert f"drove the decision {up.trace_id}, whose metric counted it, without a link" in told[1]
    assert "drove the decision" not in told[2]
    assert "drove the decision" not in invoked("trace", up.trace_id).output
    found = json.loads(invoked("trace", requests[1].trace_id, "--json").output)
    assert [(d["trace_id"], d["linked"]) for d in found["led_to"]] == [(up.trace_id, False)]


def test_a_request_is_shown_though_nobody_can_be_asked_for_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    request = burst()[0]
    kept = kept_in_memory(monkeypatch, [request])
    kept.search = lambda *_, **__: refused()  # type: ignore[method-assign]
    shown = invoked("trace", request.trace_id, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["led_to"] is None
    assert "which decisions to scale it drove is not known: no search" in shown.stderr


def refused() -> list[Any]:
    raise UserError("no search")


def test_a_wrong_trace_of_anybody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = map(without_client, burst()[:2])
    spans = tuple(s for s in bad.spans if s.name != a.SERVER_SPAN)
    kept_in_memory(monkeypatch, [good, Trace(bad.trace_id, spans)])
    verified = invoked("verify", "autoscaling", "--since", "2h")
    assert verified.exit_code == 1
    assert "1 of 2 traces are wrong; look at: vllm" in verified.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("answer", "prefix-cache", "--since", "2h"), "prefix-cache is about what `llmtrace run` has sent"),
        (("answer", "autoscaling", "--since", "2h", "--run", "run-1"), "give one of the two"),
        (("answer", "autoscaling", "--until", "2h"), "--until needs --since"),
        (("verify", "autoscaling", "--since", "soon"), "'soon' is no time: give a duration before now"),
        (("verify", "autoscaling", "--since", "1h", "--until", "2h"), "--since 1h is not before --until 2h"),
        (("answer", "autoscaling", "--since", "2h"), "the store has no trace of { name"),
    ],
)
def test_a_time_that_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    kept_in_memory(monkeypatch, [])
    with pytest.raises(UserError, match=sentence):
        invoked(*arguments)


def test_verify_checks_the_decisions_too() -> None:
    from test_scenario_runs import UP

    from llmtrace.scenarios.autoscaling import SCENARIO
    from llmtrace.scenarios.smoke import verify

    up, down = burst()[-2:]
    lost = Trace(down.trace_id, tuple(s for s in down.spans if s.name != a.APPLY_SPAN))
    kept: Any = MemoryStore({})
    good = verify(kept, {}, SCENARIO, UP, timeout_s=0.1, others=[up, down])
    bad = verify(kept, {}, SCENARIO, UP, timeout_s=0.1, others=[up, lost])
    assert good.ok
    assert [t.problems for t in good.traces] == [[], []]
    assert not bad.ok
    problems = [p for t in bad.traces for p in t.problems]
    assert {(p.component, p.fault) for p in problems} >= {("scaler", Fault.MISSING), ("scaler", Fault.ORPHAN)}
