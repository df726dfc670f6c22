"""The dashboard of wide expert parallelism, its rules and its alert on the running stack."""

from __future__ import annotations

import dashboards
import pytest

from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
UNEVEN = ("Full experts",)
"""Panels of what differs between experts: the model's router, of random weights, prefers some. Whether one of two ranks
is waited for depends on the machine.
"""


@pytest.fixture(scope="module")
def stack(wide_ep_stack: Stack) -> Stack:
    dashboards.traffic(wide_ep_stack)
    return wide_ep_stack


def test_every_panel_has_data(stack: Stack) -> None:
    dashboards.until_none(lambda: dashboards.without_data(stack, fewest=12, needed=UNEVEN), stack)


def test_every_alert_has_something_to_go_by(stack: Stack) -> None:
    dashboards.until_none(lambda: dashboards.rules_without_data(stack), stack)


def test_the_steps_are_in_the_store(stack: Stack) -> None:
    """Whether one takes 100 ms depends on the machine; that they take more than 0.1 ms does not."""
    traceql = dashboards.tables()["Long steps"]
    assert "100ms" in traceql
    assert dashboards.found(stack, traceql.replace("100ms", "100us")) > 0
