"""The dashboards and alerts on the running stack: every query has data in the scenario that it is for.

The stack must have served the scenario's traffic within the last half hour; the test sends a little itself.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from grafana.dashboards import boards
from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute
from llmtrace.stack import Stack
from llmtrace.traces.tempo import TempoClient

pytestmark = pytest.mark.stack

RANGE_S, STEP_S = 1800, 15
REQUESTS = 6
WORDS = "the harbour keeps a long list of ships that come and go with the tide and the wind " * 45


@pytest.fixture(scope="module")
def stack() -> Stack:
    stack = Stack.load()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: ask(stack, number), range(REQUESTS)))
    return stack


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


def test_every_panel_has_data(stack: Stack) -> None:
    # Rates need two scrapes, and two flushes of the Collector's span metrics, with requests between them.
    deadline = time.monotonic() + 90
    while empty := without_data(stack):
        assert time.monotonic() < deadline, empty
        ask(stack, 0)
        time.sleep(2)


def without_data(stack: Stack) -> list[str]:
    """The queries of the scenario's dashboards that should have data and have none."""
    empty: list[str] = []
    asked = 0
    end = time.time()
    with httpx.Client(base_url=stack.prometheus, timeout=30, trust_env=False) as client:
        for board in boards():
            if stack.scenario not in board.scenarios:
                continue
            dashboard = json.loads((FOLDER / f"{board.uid.removeprefix('llmtrace-')}.json").read_text())
            values = defaults(dashboard) | built_in(STEP_S, 5, RANGE_S)
            for panel in board.panels():
                for query in panel.queries:
                    expr = substitute(query.expr, values)
                    told = {"query": expr, "start": end - RANGE_S, "end": end, "step": STEP_S}
                    answer = client.post("/api/v1/query_range", data=told)
                    assert answer.status_code == 200, f"{board.uid}: {panel.title}: {answer.text}"
                    elsewhere = panel.scenario not in ("", stack.scenario)
                    asked += 1
                    if not answer.json()["data"]["result"] and not query.may_be_empty and not elsewhere:
                        empty.append(f"{board.uid}: {panel.title}: {expr}")
    assert asked > 60
    return empty


def test_the_variables_have_values(stack: Stack) -> None:
    with httpx.Client(base_url=stack.prometheus, timeout=30, trust_env=False) as client:
        names = client.get("/api/v1/label/instance/values", params={"match[]": "vllm:num_requests_running"}).json()
        models = client.get("/api/v1/label/model_name/values", params={"match[]": "vllm:num_requests_running"}).json()
    assert {server.name for server in stack.servers} <= set(names["data"])
    assert stack.model in models["data"]


def test_every_alert_is_loaded_and_the_traces_are_whole(stack: Stack) -> None:
    groups = httpx.get(f"{stack.prometheus}/api/v1/rules", timeout=30, trust_env=False).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["name"] for rule in rules if rule["type"] == "alerting"}) == 10
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"] == []
    kept = [rule["name"] for rule in rules if rule.get("state") == "firing" and "Broken" in rule["name"]]
    assert kept == []


def test_every_trace_table_is_answered_by_the_store(stack: Stack) -> None:
    client = TempoClient(stack.store)
    found: dict[str, int] = {}
    now = int(time.time())
    for board in boards():
        dashboard = json.loads((FOLDER / f"{board.uid.removeprefix('llmtrace-')}.json").read_text())
        values = defaults(dashboard)
        for table in board.trace_tables():
            if not table.beyond_store:
                found[table.title] = len(
                    client.search(substitute(table.traceql, values), start_s=now - RANGE_S, end_s=now + 5, limit=20)
                )
    client.close()
    wanted = {"prefix-cache": "Prompts from the cache", "pd-disaggregation": "Split requests"}
    assert found[wanted[stack.scenario]] > 0, found
