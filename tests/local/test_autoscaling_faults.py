"""The autoscaling scenario where a server that the scaler starts cannot come up."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from commands import llmtrace
from loopback import until
from test_autoscaling import CALM_S, asleep, replicas, stored

from llmtrace.scenarios.autoscaling import SCENARIO
from llmtrace.semconv import attributes as a
from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

BROKEN = "vllm-1"
"""The first server that the scaler starts."""


def test_a_server_that_never_gets_ready_is_reported_with_the_reason(autoscaling_stack: Stack) -> None:
    """Its port is taken: vLLM ends, is started again, ends again, and another server is started in its place."""
    stack = autoscaling_stack
    until(lambda: asleep(stack) == {"vllm-1", "vllm-2"}, "the calm before the run", CALM_S, poll_s=1)
    (server,) = [s for s in stack.servers if s.name == BROKEN]
    with closing(socket.create_server(("127.0.0.1", urlsplit(server.url).port or 0))):
        ran = llmtrace("run", SCENARIO.name, "--seed", "12")
        assert ran.returncode == 0, ran.stderr
        until(lambda: asleep(stack) == {"vllm-1", "vllm-2"}, "the end of the servers that were added", CALM_S, poll_s=1)

        def told() -> list[dict[str, object]]:
            done = llmtrace("answer", SCENARIO.name, "--json")
            assert done.returncode == 0, done.stderr
            return [d for d in json.loads(done.stdout)["decisions"] if d["failures"]]

        decisions = until(told, "the trace of the decision whose server failed", CALM_S, poll_s=2)
    for decision in decisions:
        (failure,) = decision["failures"]
        assert failure.startswith(f"{BROKEN}: ")
        assert "Address already in use" in failure
        ((span, _),) = replicas(stored(stack, str(decision["trace_id"])), a.OUTCOME_FAILED)
        assert span.attributes[a.REPLICA] == BROKEN
        assert span.status == "ERROR"
    shown = llmtrace("answer", SCENARIO.name)
    assert shown.returncode == 0, shown.stderr
    assert f"never ready: {BROKEN}: " in " ".join(shown.stdout.split())
    verified = llmtrace("verify", SCENARIO.name)
    assert verified.returncode == 0, verified.stdout + verified.stderr
