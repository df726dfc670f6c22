"""The dashboard of autoscaling on the running stack, after the scenario's own test has scaled it up and down."""

from __future__ import annotations

import dashboards
import pytest

from llmtrace.scenarios.autoscaling import NAME
from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
SCALED = ("Replicas", "Decisions by direction", "What a new replica's time goes into")
"""Panels that a scaler fills which has added replicas."""


@pytest.fixture(scope="module")
def stack() -> Stack:
    stack = Stack.load()
    if stack.scenario != NAME:
        pytest.skip("follows tests/local/test_autoscaling.py")
    return stack


def test_every_panel_has_data(stack: Stack) -> None:
    assert dashboards.without_data(stack, fewest=10, needed=SCALED) == []


def test_its_alerts_have_something_to_go_by(stack: Stack) -> None:
    assert [name for name in dashboards.rules_without_data(stack) if name.startswith("LLMScaling")] == []


def test_the_decisions_are_in_the_store(stack: Stack) -> None:
    assert dashboards.found_by_tables(stack)["Decisions with their numbers"] > 0
