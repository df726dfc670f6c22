"""The smoke test: a few requests with known trace ids, and a check of every trace that they must produce."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError
from llmtrace.scenarios.driver import Driver
from llmtrace.scenarios.expectation import CLOCK_TOLERANCE_MS, Fault, Problem, verify_trace
from llmtrace.scenarios.runs import wait_for
from llmtrace.scenarios.scenario import AnswerT, Scenario
from llmtrace.scenarios.workload import Request
from llmtrace.stack import Stack
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient


class VerifiedTrace(BaseModel):
    """One request's trace and everything that is wrong with it."""

    model_config = ConfigDict(frozen=True)
    trace_id: str
    arm: str
    spans: int
    problems: list[Problem]


class Verification(BaseModel):
    """The outcome of the smoke test."""

    model_config = ConfigDict(frozen=True)
    scenario: str
    clock_tolerance_ms: float
    ok: bool
    failed_requests: list[str]
    traces: list[VerifiedTrace]


async def send_smoke_requests(driver: Driver, requests: list[Request]) -> dict[str, str]:
    """Send the requests by each arm, one after the other; returns the arm by trace id."""
    sent = {}
    for arm in driver.settings.arms:
        for request in requests:
            sent[await driver.send_one(arm, request)] = arm
    if not sent:
        raise UserError("the stack has no gateway to send requests to; run `llmtrace up`")
    return sent


def verify(
    store: TempoClient,
    sent: dict[str, str],
    scenario: Scenario[AnswerT],
    stack: Stack,
    *,
    timeout_s: float,
    clock_tolerance_ms: float = CLOCK_TOLERANCE_MS,
    failed_requests: list[str] | None = None,
    others: Sequence[Trace] = (),
) -> Verification:
    """Wait until every trace is right, or ``timeout_s`` is over, and say what is wrong with each then.

    ``sent`` is the arm of each request by its trace id; ``stack`` is where they were sent. ``others`` are checked as
    they are.
    """

    def problems(trace: Trace) -> list[Problem]:
        expected = scenario.expectation(trace)
        differ = verify_trace(trace, expected, clock_tolerance_ms=clock_tolerance_ms)
        return differ + scenario.further(trace, sent[trace.trace_id], stack)

    seen = wait_for(store, [each for each in sent if int(each, 16)], lambda trace: not problems(trace), timeout_s)
    checked = []
    for trace_id, arm in sent.items():
        if not int(trace_id, 16):
            checked.append(VerifiedTrace(trace_id=trace_id, arm=arm, spans=0, problems=[_untraced(scenario)]))
            continue
        trace = seen[trace_id] or Trace(trace_id, ())
        checked.append(VerifiedTrace(trace_id=trace_id, arm=arm, spans=len(trace.spans), problems=problems(trace)))
    for trace in others:
        differ = verify_trace(trace, scenario.expectation(trace), clock_tolerance_ms=clock_tolerance_ms)
        checked.append(VerifiedTrace(trace_id=trace.trace_id, arm="", spans=len(trace.spans), problems=differ))
    return Verification(
        scenario=scenario.name,
        clock_tolerance_ms=clock_tolerance_ms,
        ok=not any(t.problems for t in checked) and not failed_requests,
        failed_requests=failed_requests or [],
        traces=checked,
    )


def _untraced(scenario: Scenario[AnswerT]) -> Problem:
    """The client made no span at all, and so named no trace."""
    return Problem(
        trace_id="",
        fault=Fault.MISSING,
        component="client",
        message="the client's tracing is off: it sent its request without a trace",
        hint=scenario.expectation(Trace("", ())).hints.get("client", ""),
    )
