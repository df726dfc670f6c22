"""Verify can fail: with tracing switched off in one component after the other, it names that component."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from commands import llmtrace

from llmtrace.deploy.supervisor import Supervisor
from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _restored() -> Iterator[None]:
    """Whatever happens, the stack is whole again afterwards."""
    yield
    done = llmtrace("up")
    assert done.returncode == 0, done.stdout + done.stderr


def verify(*arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = llmtrace("verify", "prefix-cache", "--json", "--timeout", "10", *arguments, **environment)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def blamed(found: dict[str, Any]) -> set[str]:
    return {problem["component"] for trace in found["traces"] for problem in trace["problems"]}


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_a_client_without_tracing_is_named(variables: dict[str, str]) -> None:
    code, found = verify(**variables)
    assert (code, blamed(found)) == (1, {"client"})


def test_a_stopped_collector_is_named() -> None:
    stack = Stack.load()
    supervisor = Supervisor(stack.supervisor_socket)
    supervisor._call("stopProcess", "collector")
    try:
        code, found = verify()
    finally:
        supervisor._call("startProcess", "collector")
    assert (code, blamed(found)) == (1, {"collector"})
    assert found["failed_requests"] == [], "tracing never fails a request"


# The model servers come last: they restart for a minute.
@pytest.mark.parametrize("component", ["envoy", "picker", "engine", "vllm"])
def test_a_component_without_tracing_is_named(component: str) -> None:
    switched = llmtrace("up", "-e", json.dumps({"tracing_off": [component], "vllm_servers": 1}))
    assert switched.returncode == 0, switched.stdout + switched.stderr
    code, found = verify()
    assert (code, blamed(found)) == (1, {component})
    assert all(trace["problems"] for trace in found["traces"])
    assert {problem["fault"] for trace in found["traces"] for problem in trace["problems"]} == {"missing"}
