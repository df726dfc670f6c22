"""Which requests drove each scaling decision, and what did waiting cost?"""

from __future__ import annotations

from llmtrace.scenarios.autoscaling.answer import AutoscalingAnswer, answer
from llmtrace.scenarios.autoscaling.arms import ARMS, NAME
from llmtrace.scenarios.autoscaling.expected import REQUESTS, decisions, expected
from llmtrace.scenarios.autoscaling.text import answer_text
from llmtrace.scenarios.autoscaling.workload import AutoscalingWorkload, smoke_requests
from llmtrace.scenarios.scenario import Scenario

__all__ = ["SCENARIO"]


def _html(found: AutoscalingAnswer) -> str:
    # The plotting library takes a second to import; only reports need it.
    from llmtrace.scenarios.autoscaling.report import autoscaling_html

    return autoscaling_html(found)


def _example(found: AutoscalingAnswer) -> str | None:
    """The decision while which requests waited most, else a request."""
    if found.decisions:
        return max(found.decisions, key=lambda d: d.wait_user_s).trace_id
    return next(iter(found.led_to), None)


SCENARIO = Scenario(
    name=NAME,
    arms=ARMS,
    workload=AutoscalingWorkload,
    smoke_requests=smoke_requests,
    expectation=expected,
    also=decisions,
    traffic=REQUESTS,
    answer=answer,
    text=answer_text,
    html=_html,
    example=_example,
    max_tokens=48,
    concurrency=256,
    request_timeout_s=120.0,
)
