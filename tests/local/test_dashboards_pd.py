"""The dashboards and alerts on the running stack of prefill and decode servers."""

from __future__ import annotations

import dashboards
import pytest

from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(pd_stack: Stack) -> Stack:
    dashboards.traffic(pd_stack)
    return pd_stack


def test_every_panel_has_data(stack: Stack) -> None:
    dashboards.until_none(lambda: dashboards.without_data(stack), stack)


def test_every_alert_has_something_to_go_by(stack: Stack) -> None:
    assert dashboards.rules_without_data(stack) == []


def test_every_trace_table_is_answered_by_the_store(stack: Stack) -> None:
    assert dashboards.found_by_tables(stack)["Split requests"] > 0
