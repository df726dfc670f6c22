"""The autoscaling scenario's workload, how the driver sends it, and the commands on its traces."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import typer
from example_scaling import QUERY
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
