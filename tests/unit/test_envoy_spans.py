"""What a real Envoy with the playbook's bootstrap tells of a request's tenant and of its caller's trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from envoy_process import Gateway, gateway

from llmtrace.semconv import attributes as a

TRACE_ID = "5" * 32
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-00000000000000aa-01"}
STRANGER = "127.0.0.2"


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("envoy"), {}) as running:
        yield running


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With another header for tenants as well."""
    variables = {"trace_context_networks": ["0.0.0.0/0"], "tenant_header": "x-team"}
    with gateway(tmp_path_factory.mktemp("envoy"), variables) as running:
        yield running


def test_the_tenant_is_what_the_header_says(default: Gateway, open_to_all: Gateway) -> None:
    headers = {a.FAIRNESS_HEADER: "harbour", "x-team": "library"}
    assert default.ask(headers).attributes[a.TENANT] == "harbour"
    assert open_to_all.ask(headers).attributes[a.TENANT] == "library"
    for running in (default, open_to_all):
        assert a.TENANT not in running.ask({}).attributes


@pytest.mark.parametrize("caller", ["127.0.0.1", STRANGER])
def test_everybodys_trace_is_continued_where_the_networks_are_all(open_to_all: Gateway, caller: str) -> None:
    span = open_to_all.ask(TRACEPARENT, caller)
    assert (span.trace_id, span.parent_id) == (TRACE_ID, "00000000000000aa")
    assert "llmtrace.caller.traceparent" not in span.attributes


def test_by_default_a_strangers_is_not(default: Gateway) -> None:
    assert default.ask(TRACEPARENT).trace_id == TRACE_ID
    span = default.ask(TRACEPARENT, STRANGER)
    assert span.trace_id != TRACE_ID
    assert span.attributes["llmtrace.caller.traceparent"] == TRACEPARENT["traceparent"]
