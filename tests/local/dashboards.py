"""What the tests of dashboards and alerts on the running stack share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import yaml
from parsed_promql import nodes, selector

from grafana.board import Board, Panel, Query
from grafana.dashboards import boards
from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute
from llmtrace.stack import Stack
from llmtrace.traces.tempo import TempoClient

RANGE_S, STEP_S, SCRAPE_S = 1800, 15, 5
WAIT_S = 90
REQUESTS = 6
WORDS = "the harbour keeps a long list of ships that come and go with the tide and the wind " * 45
ALERTS = FOLDER.parent / "alerts" / "llmtrace.yaml"
NOT_ON_A_HEALTHY_STACK = {
    "llm_d_epp_request_error_total": "there from the first failed request",
    "otelcol_exporter_send_failed_spans_total": "there from the first failure",
    "otelcol_exporter_enqueue_failed_spans_total": "there from the first failure",
    "otelcol_processor_tail_sampling_traces_dropped_too_large_total": "gateways only",
    "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early_total": "gateways only",
}
"""Metrics of alerts that have no series here, and why."""
OF_A_SCENARIO = {
    "vllm:nixl_": "pd-disaggregation",
    "llmtrace_autoscale_": "autoscaling",
    "llm_d_epp_flow_control_": "autoscaling",
    "llmtrace_step_": "wide-ep",
    "llmtrace:rank_": "wide-ep",
}
"""How metrics of alerts begin that only one scenario's stack has, and which."""


def traffic(stack: Stack) -> None:
    """A little of it, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: ask(stack, number), range(REQUESTS)))


def ask(stack: Stack, number: int) -> None:
    """One long chat on each arm: the first is new to the caches, the next ones are not."""
    for url in stack.gateways.values():
        body = {
            "model": stack.model,
            "messages": [{"role": "user", "content": f"Dashboard {number % 2}: {WORDS} How many ships are there?"}],
            "max_tokens": 16,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=110, trust_env=False).raise_for_status()


def refused(stack: Stack) -> None:
    """One chat without messages on each arm, which the picker refuses: a span with an error."""
    for url in stack.gateways.values():
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": stack.model}, timeout=30, trust_env=False)
        assert answer.status_code == httpx.codes.BAD_REQUEST, answer.text


def until_none(empty: Callable[[], list[str]], stack: Stack) -> None:
    """Ask on until ``empty()`` names nothing: rates need two scrapes, with requests between them."""
    deadline = time.monotonic() + WAIT_S
    while named := empty():
        assert time.monotonic() < deadline, named
        ask(stack, 0)
        time.sleep(2)


def prometheus(stack: Stack) -> httpx.Client:
    return httpx.Client(base_url=stack.prometheus, timeout=30, trust_env=False)


def queries(stack: Stack) -> Iterator[tuple[Panel, Query, str]]:
    """The queries for the stack's scenario: their panel, what they are, and as Grafana sends them."""
    for board in boards():
        if stack.scenario not in board.scenarios:
            continue
        values = defaults(generated(board)) | built_in(STEP_S, SCRAPE_S, RANGE_S)
        for panel in board.panels():
            if panel.scenario in ("", stack.scenario):
                for query in panel.queries:
                    yield panel, query, substitute(query.expr, values)


def generated(board: Board) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{board.uid.removeprefix('llmtrace-')}.json").read_text())
    return found


def without_data(stack: Stack, fewest: int = 60, needed: Collection[str] = ()) -> list[str]:
    """The queries that should have data, and where the panel shows exemplars those too, and have none.

    ``needed`` are titles of panels whose queries may be empty elsewhere, and have data after what the test has done.
    """
    empty: list[str] = []
    asked: list[Panel] = []
    end = time.time()
    when = {"start": end - RANGE_S, "end": end}
    with prometheus(stack) as client:
        for panel, query, expr in queries(stack):
            asked.append(panel)
            answer = client.post("/api/v1/query_range", data={"query": expr, "step": STEP_S} | when)
            assert answer.status_code == 200, f"{panel.title}: {answer.text}"
            if query.may_be_empty and panel.title not in needed:
                continue
            if not answer.json()["data"]["result"]:
                empty.append(f"{panel.title}: {expr}")
            if query.exemplars:
                told = client.post("/api/v1/query_exemplars", data={"query": expr} | when).json()["data"]
                if not any("trace_id" in e["labels"] for series in told for e in series["exemplars"]):
                    empty.append(f"{panel.title}: exemplars of {expr}")
    assert len(asked) >= fewest
    assert {*needed} <= {panel.title for panel in asked}
    return empty


def rules_without_data(stack: Stack) -> list[str]:
    """The selectors of alerts and recording rules that match no series, but for what this stack need not have."""
    empty: list[str] = []
    end = time.time()
    with prometheus(stack) as client:
        for group in yaml.safe_load(ALERTS.read_text())["groups"]:
            for rule in group["rules"]:
                tree = client.post("/api/v1/parse_query", data={"query": rule["expr"]}).json()["data"]
                for node in nodes(tree):
                    if node.get("type") not in ("vectorSelector", "matrixSelector"):
                        continue
                    if node["name"] in NOT_ON_A_HEALTHY_STACK or elsewhere(node["name"], stack):
                        continue
                    told = {"match[]": selector(node), "start": end - RANGE_S, "end": end}
                    if not client.post("/api/v1/series", data=told).json()["data"]:
                        empty.append(f"{rule.get('alert', rule.get('record'))}: {selector(node)}")
    return empty


def elsewhere(metric: str, stack: Stack) -> bool:
    """Whether only another scenario's stack has the metric."""
    return any(metric.startswith(prefix) for prefix, of in OF_A_SCENARIO.items() if of != stack.scenario)


def alerts() -> set[str]:
    """The names of the kit's alerts."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def rules(stack: Stack) -> list[dict[str, Any]]:
    with prometheus(stack) as client:
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def tables() -> dict[str, str]:
    """The TraceQL of each table by its title, as Grafana sends it."""
    return {
        table.title: substitute(table.traceql, defaults(generated(board)))
        for board in boards()
        for table in board.trace_tables()
    }


def found_by_tables(stack: Stack) -> dict[str, int]:
    """How many traces the store finds for each table."""
    return {title: found(stack, traceql) for title, traceql in tables().items()}


def found(stack: Stack, traceql: str) -> int:
    """How many traces of the last half hour the store finds, up to 20."""
    now = int(time.time())
    with TempoClient(stack.store) as client:
        return len(client.search(traceql, start_s=now - RANGE_S, end_s=now + 5, limit=20))
