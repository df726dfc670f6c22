"""Why was each request split over a prefill and a decode server, or not, and what did the transfer of KV cost?"""

from __future__ import annotations

from llmtrace.scenarios.pd_disaggregation.answer import PdAnswer, answer
from llmtrace.scenarios.pd_disaggregation.arms import ARMS, NAME
from llmtrace.scenarios.pd_disaggregation.expected import contradictions, expected, is_complete
from llmtrace.scenarios.pd_disaggregation.rule import configured
from llmtrace.scenarios.pd_disaggregation.text import answer_text
from llmtrace.scenarios.pd_disaggregation.workload import PdWorkload, smoke_requests
from llmtrace.scenarios.scenario import Scenario

__all__ = ["SCENARIO"]


def _html(found: PdAnswer) -> str:
    # The plotting library takes a second to import; only reports need it.
    from llmtrace.scenarios.pd_disaggregation.report import pd_html

    return pd_html(found)


def _example(found: PdAnswer) -> str | None:
    """The split request whose KV took longest, else any request."""
    split = [r for r in found.requests if r.split]
    return max(split or found.requests, key=lambda r: r.kv_wait_ms or 0.0).trace_id if found.requests else None


SCENARIO = Scenario(
    name=NAME,
    arms=ARMS,
    workload=PdWorkload,
    smoke_requests=smoke_requests,
    expectation=expected,
    further=contradictions,
    complete=is_complete,
    arm_facts=configured,
    answer=answer,
    text=answer_text,
    html=_html,
    example=_example,
    max_tokens=16,
    concurrency=4,
)
