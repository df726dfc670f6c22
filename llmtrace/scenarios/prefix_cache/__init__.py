"""Where were the cache hits, and does prefix-aware routing improve time to first token over random routing?"""

from __future__ import annotations

from llmtrace.scenarios.prefix_cache.answer import PrefixCacheAnswer, answer
from llmtrace.scenarios.prefix_cache.expected import ARMS, EXPECTATION, NAME
from llmtrace.scenarios.prefix_cache.text import answer_text
from llmtrace.scenarios.prefix_cache.workload import PrefixCacheWorkload, smoke_requests
from llmtrace.scenarios.scenario import Scenario

__all__ = ["EXPECTATION", "NAME", "SCENARIO"]


def _html(found: PrefixCacheAnswer) -> str:
    # The plotting library takes a second to import; only reports need it.
    from llmtrace.scenarios.prefix_cache.report import prefix_cache_html

    return prefix_cache_html(found)


def _example(found: PrefixCacheAnswer) -> str | None:
    """The most expensive missed decision, else any request."""
    if found.missed:
        return found.missed[0].trace_id
    return found.pairs[0].candidate_trace_id if found.pairs else None


SCENARIO = Scenario(
    name=NAME,
    arms=ARMS,
    workload=PrefixCacheWorkload,
    smoke_requests=smoke_requests,
    expectation=lambda _trace: EXPECTATION,
    answer=answer,
    text=answer_text,
    html=_html,
    example=_example,
)
