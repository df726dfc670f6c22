"""Whose trace context the gateway continues: callers at 127.0.0.1; for 127.0.0.2 a new trace begins."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from commands import llmtrace
from engine_servers import in_trace, new_trace_id
from loopback import until
from stored import trace_of

from llmtrace.semconv import attributes as names
from llmtrace.stack import Stack
from llmtrace.traces.model import Link, Trace
from llmtrace.traces.tempo import TempoClient

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
SECRET = "for-this-test-only"
STRANGER = "127.0.0.2"
GATEWAY = (names.PICKER_SERVICE, names.GATEWAY_SPAN)


def ask(stack: Stack, caller: str, trace_id: str, secret: str = "") -> None:
    headers = in_trace(trace_id) | ({"x-llmtrace-trace-secret": secret} if secret else {})
    headers[names.CALLER_HEADER] = f"00-{'9' * 32}-{'9' * 16}-01"  # which no client may set
    body = {"model": stack.model, "prompt": "Hello", "max_tokens": 2}
    gateway = next(iter(stack.gateways.values()))
    with httpx.Client(transport=httpx.HTTPTransport(local_address=caller), timeout=60) as client:
        client.post(f"{gateway}/v1/completions", json=body, headers=headers).raise_for_status()


def linked_trace(stack: Stack, trace_id: str) -> Trace:
    """The new trace whose gateway's span tells the context of a caller in the trace ``trace_id``."""
    query = f'{{ span.llmtrace.caller.traceparent = "00-{trace_id}-00000000000000aa-01" }}'
    with TempoClient(stack.store) as client:
        (found,) = until(
            lambda: client.search(query, start_s=0, end_s=1 << 33, limit=5), f"a trace that tells of {trace_id}", 30
        )
    return trace_of(stack, found.trace_id, GATEWAY, ("vllm", names.SERVER_SPAN))


def test_the_trace_of_a_trusted_caller_goes_on() -> None:
    stack, trace_id = Stack.load(), new_trace_id()
    ask(stack, "127.0.0.1", trace_id)
    (span,) = trace_of(stack, trace_id, GATEWAY).named(names.GATEWAY_SPAN)
    assert span.links == ()


def test_for_a_stranger_a_new_trace_begins_with_a_link() -> None:
    stack, trace_id = Stack.load(), new_trace_id()
    ask(stack, STRANGER, trace_id)
    trace = linked_trace(stack, trace_id)
    assert trace.trace_id != trace_id
    (span,) = trace.named(names.GATEWAY_SPAN)
    assert span.links == (Link(trace_id, "00000000000000aa"),)
    assert TempoClient(stack.store).trace(trace_id) is None


@pytest.fixture
def with_secret() -> Iterator[Stack]:
    done = llmtrace("up", "-e", json.dumps({"trace_context_secret": SECRET}))
    assert done.returncode == 0, done.stdout + done.stderr
    yield Stack.load()
    done = llmtrace("up")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stranger_with_the_secret_is_trusted(with_secret: Stack) -> None:
    trace_id, wrong = new_trace_id(), new_trace_id()
    ask(with_secret, STRANGER, trace_id, SECRET)
    (span,) = trace_of(with_secret, trace_id, GATEWAY).named(names.GATEWAY_SPAN)
    assert span.links == ()
    ask(with_secret, STRANGER, wrong, "something-else-of-16")
    linked_trace(with_secret, wrong)
