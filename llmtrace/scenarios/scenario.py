"""What a scenario is: arms, a workload, the trace that each request must produce, and an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel
from rich.console import RenderableType

from llmtrace.scenarios.expectation import Expectation, Problem
from llmtrace.scenarios.workload import Request, Workload
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack
from llmtrace.traces.model import Attributes, Trace
from llmtrace.traces.tempo import TempoClient

AnswerT = TypeVar("AnswerT", bound=BaseModel)


def is_complete(trace: Trace) -> bool:
    """Whether a request's trace has what an answer reads; a failed request needs no model server."""
    if not any(s.service == a.CLIENT_SERVICE for s in trace.spans):
        return False
    failed = any(s.status == "ERROR" for s in trace.spans)
    return failed or (bool(trace.named(a.GATEWAY_SPAN)) and bool(trace.named(a.SERVER_SPAN)))


@dataclass(frozen=True)
class Scenario(Generic[AnswerT]):
    """One scenario; the commands know no more of it than this.

    ``arms`` are the gateways that every request is sent through. ``workload`` makes the workload of given sizes
    (``blocks``, ``conversations``, ``turns``, ``seed``); ``max_tokens``, ``concurrency`` and ``request_timeout_s``
    are defaults. ``arm_facts`` are attributes of each arm's blocks that only the stack's configuration tells.
    ``complete`` says whether a request's trace has what ``answer`` reads; ``text`` and ``html`` show an answer,
    ``example`` is the id of a trace of it that is worth a look. With ``linked``, ``answer`` also gets the traces to
    which those of the run link. Of the smoke test, ``smoke_requests`` are its requests, in order; ``expectation`` is
    what each trace must have, and ``further`` finds what else is wrong with it, given its arm and the stack. ``also``
    finds further traces of a time (nanoseconds since the epoch, its start and end) that no request is part of; the
    answer gets them too, and the smoke test checks them. ``traffic`` is a TraceQL query for the requests of anybody,
    where the scenario also has an answer about those that its driver did not send.
    """

    name: str
    arms: tuple[str, ...]
    workload: Callable[..., Workload]
    smoke_requests: Callable[[], list[Request]]
    expectation: Callable[[Trace], Expectation]
    answer: Callable[[str, Iterable[Trace]], AnswerT]
    text: Callable[[AnswerT], Iterable[RenderableType]]
    html: Callable[[AnswerT], str]
    example: Callable[[AnswerT], str | None]
    further: Callable[[Trace, str, Stack], list[Problem]] = lambda _trace, _arm, _stack: []
    complete: Callable[[Trace], bool] = is_complete
    arm_facts: Callable[[Stack], Mapping[str, Attributes]] = lambda _stack: {}
    linked: bool = False
    also: Callable[[TempoClient, int, int], list[Trace]] = lambda _store, _start_ns, _end_ns: []
    traffic: str = ""
    max_tokens: int = 8
    concurrency: int = 2
    request_timeout_s: float = 60.0
