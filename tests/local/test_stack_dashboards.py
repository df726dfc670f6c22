"""The dashboards and alerts on the running stack: every query has data in the scenario that it is for."""

from __future__ import annotations

import dashboards
import pytest

from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def stack() -> Stack:
    stack = Stack.load()
    dashboards.traffic(stack)
    return stack


def test_every_panel_has_data(stack: Stack) -> None:
    def empty() -> list[str]:
        dashboards.refused(stack)
        return dashboards.without_data(stack, needed=["Spans with an error"])

    dashboards.until_none(empty, stack)
    assert dashboards.found_by_tables(stack)["Failed requests"] > 0


def test_every_alert_has_something_to_go_by(stack: Stack) -> None:
    loaded = dashboards.rules(stack)
    assert {rule["name"] for rule in loaded if rule["type"] == "alerting"} == dashboards.alerts()
    assert [(rule["name"], rule.get("lastError")) for rule in loaded if rule["health"] == "err"] == []
    assert dashboards.rules_without_data(stack) == []


def test_no_alert_says_that_traces_are_broken_or_lost(stack: Stack) -> None:
    firing = {rule["name"] for rule in dashboards.rules(stack) if rule.get("state") == "firing"}
    assert firing & {"LLMTracesBroken", "LLMSpansDropped", "LLMSpansRefused", "LLMModelServerSilent"} == set()


def test_the_variables_have_values(stack: Stack) -> None:
    match = {"match[]": "vllm:num_requests_running"}
    with dashboards.prometheus(stack) as client:
        names = client.get("/api/v1/label/instance/values", params=match).json()
        models = client.get("/api/v1/label/model_name/values", params=match).json()
    assert {server.name for server in stack.servers} <= set(names["data"])
    assert stack.model in models["data"]


def test_every_trace_table_is_answered_by_the_store(stack: Stack) -> None:
    assert dashboards.found_by_tables(stack)["Prompts from the cache"] > 0
