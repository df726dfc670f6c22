"""Where do the engine's steps spend their time over ranks and nodes, and who waits for whom?

From the ``engine_step`` spans of any store, and the requests that link to them.
"""

from __future__ import annotations

from llmtrace.scenarios.required import expectation
from llmtrace.scenarios.scenario import Scenario
from llmtrace.scenarios.wide_ep.answer import WideEpAnswer, answer
from llmtrace.scenarios.wide_ep.text import answer_text
from llmtrace.scenarios.wide_ep.verify import link_problems
from llmtrace.scenarios.wide_ep.workload import WideEpWorkload, smoke_requests
from llmtrace.semconv.definitions import registry

__all__ = ["ARMS", "NAME", "SCENARIO"]

NAME = "wide-ep"
ARMS = ("balanced",)

_EXPECTATION = expectation(registry(), NAME)


def _html(found: WideEpAnswer) -> str:
    # The plotting library takes a second to import; only reports need it.
    from llmtrace.scenarios.wide_ep.report import wide_ep_html

    return wide_ep_html(found)


SCENARIO = Scenario(
    name=NAME,
    arms=ARMS,
    workload=WideEpWorkload,
    smoke_requests=smoke_requests,
    expectation=lambda _trace: _EXPECTATION,
    further=link_problems,
    answer=answer,
    text=answer_text,
    html=_html,
    example=lambda found: found.requests[0].trace_id if found.requests else None,
    linked=True,
    max_tokens=24,
    concurrency=6,
)
