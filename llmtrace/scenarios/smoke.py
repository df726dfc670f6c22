"""The smoke test: a few requests with known trace ids, and a check of every trace that they must produce.

And the same check of traces that are there already, of any number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError
from llmtrace.scenarios.alike import Verifier
from llmtrace.scenarios.driver import Driver
from llmtrace.scenarios.expectation import CLOCK_TOLERANCE_MS, Expectation, Fault, Problem, verify_trace
from llmtrace.scenarios.runs import wait_for
from llmtrace.scenarios.scenario import AnswerT, Scenario
from llmtrace.scenarios.workload import Request
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient

CLIENT = "client"
"""The component of which requests that somebody else sends have no span."""
MOST_LISTED = 1000
"""Wrong traces that are listed, of any number that were checked."""


class VerifiedTrace(BaseModel):
    """One request's trace and everything that is wrong with it."""

    model_config = ConfigDict(frozen=True)
    trace_id: str
    arm: str
    spans: int
    problems: list[Problem]


class Verification(BaseModel):
    """The outcome: ``checked`` traces, of which ``wrong`` have problems.

    ``traces`` has those that the smoke test sent and, of others, the first that are wrong.
    """

    model_config = ConfigDict(frozen=True)
    scenario: str
    clock_tolerance_ms: float
    ok: bool
    checked: int
    wrong: int
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
    wrong = sum(bool(t.problems) for t in checked)
    return Verification(
        scenario=scenario.name,
        clock_tolerance_ms=clock_tolerance_ms,
        ok=not wrong and not failed_requests,
        checked=len(checked),
        wrong=wrong,
        failed_requests=failed_requests or [],
        traces=checked,
    )


def check(
    traces: Iterable[Trace], scenario: Scenario[AnswerT], *, clock_tolerance_ms: float = CLOCK_TOLERANCE_MS
) -> Verification:
    """What is wrong with traces as they are, whoever sent the requests; ``traces`` may be a stream."""
    others: dict[int, tuple[Expectation, Expectation]] = {}

    def expectation(trace: Trace) -> Expectation:
        expected = scenario.expectation(trace)
        if any(span.service == a.CLIENT_SERVICE for span in trace.spans):
            return expected
        if id(expected) not in others:
            others[id(expected)] = expected, expected.without(CLIENT)
        return others[id(expected)][1]

    verifier = Verifier(expectation, clock_tolerance_ms)
    listed: list[VerifiedTrace] = []
    checked = wrong = 0
    for trace in traces:
        checked += 1
        if problems := verifier.problems(trace):
            wrong += 1
            if len(listed) < MOST_LISTED:
                listed.append(VerifiedTrace(trace_id=trace.trace_id, arm="", spans=len(trace.spans), problems=problems))
    return Verification(
        scenario=scenario.name,
        clock_tolerance_ms=clock_tolerance_ms,
        ok=not wrong,
        checked=checked,
        wrong=wrong,
        failed_requests=[],
        traces=listed,
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
