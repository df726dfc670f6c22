"""What the engine tells of its steps, as the dashboard and the alert see it: through a real Prometheus."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_process import prometheus
from step_metrics import ATTENTION_MS, EXPERTS_MS, OTHER_MS, TRANSFER_MS, Ranks

from grafana import pictures
from grafana.dashboards.wide_ep import BOARD
from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute

RULES = FOLDER.parent / "alerts" / "llmtrace.yaml"
SLOW, DELAY_MS, IDLE = 5, 4.0, 6
STEP_MS = ATTENTION_MS + 2 * TRANSFER_MS + EXPERTS_MS + DELAY_MS + OTHER_MS
TOKENS = (10, 10, 50, 10)
LATER_S = 1.1


def about(expected: Any) -> Any:
    """Rates are extrapolated to the window, each rank's by when it was sent."""
    return pytest.approx(expected, rel=0.05)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Eight ranks on two nodes: one is slow in its experts, one has no requests; an expert is full."""
    ranks = Ranks(["node-a"] * 4 + ["node-b"] * 4)
    with prometheus(tmp_path_factory.mktemp("prometheus")) as running:
        for number in range(1, 4):
            ranks.step(number, experts_ms={SLOW: EXPERTS_MS + DELAY_MS}, requests={0: 3, IDLE: 0}, tokens=TOKENS)
            ranks.push(running)
            time.sleep(LATER_S)
        yield running


def ask(client: httpx.Client, query: str, *labels: str) -> dict[str, float]:
    """Values by labels, which are all that the series have."""
    answer = client.post("/api/v1/query", data={"query": query}).json()
    assert answer["status"] == "success", answer
    found = {}
    for series in answer["data"]["result"]:
        assert series["metric"].keys() - {"__name__"} == set(labels)
        found[" ".join(series["metric"][label] for label in labels)] = float(series["value"][1])
    return found


def shown(client: httpx.Client, title: str, *labels: str, query: int = 0) -> dict[str, float]:
    """What a panel shows."""
    (panel,) = (panel for panel in BOARD.panels() if panel.title == title)
    values = defaults(json.loads((FOLDER / "wide-ep.json").read_text())) | built_in(15, 5, 900)
    return ask(client, substitute(panel.queries[query].expr, values), *labels)


def test_time_by_phase(client: httpx.Client) -> None:
    found = shown(client, "A step by phase", "llmtrace_step_phase")
    assert sum(found.values()) == about(1)
    assert found["attention"] == about(ATTENTION_MS / STEP_MS)
    assert found["experts"] == about((EXPERTS_MS + DELAY_MS / 8) / STEP_MS)
    assert found["combine"] == about((TRANSFER_MS + DELAY_MS * 7 / 8) / STEP_MS)
    assert found["wait"] == 0


def test_the_slow_rank_stands_out_on_the_maps(client: httpx.Client) -> None:
    label = "llmtrace_rank_world"
    experts, collectives = shown(client, "Experts by rank", label), shown(client, "Collectives by rank", label)
    assert len(experts) == len(collectives) == 8
    assert max(experts, key=experts.__getitem__) == min(collectives, key=collectives.__getitem__) == str(SLOW)
    assert experts[str(SLOW)] == about((EXPERTS_MS + DELAY_MS) / STEP_MS)
    assert collectives["0"] - collectives[str(SLOW)] == about(DELAY_MS / STEP_MS)


def test_work_and_what_is_done_for_nobody(client: httpx.Client) -> None:
    assert shown(client, "For nobody", query=0)[""] == about(1 / 8)
    assert shown(client, "For nobody", query=1)[""] == about(1 / 10)
    work = shown(client, "Work by rank", "llmtrace_rank_world")
    assert (work["0"], work["1"], work[str(IDLE)]) == about((3, 1, 0))


def test_experts(client: httpx.Client) -> None:
    label = "llmtrace_moe_expert_id"
    assert shown(client, "Load of the experts", label) == about({"0": 0.5, "1": 0.5, "2": 2.5, "3": 0.5})
    assert shown(client, "Imbalance of the experts") == about({"": 2.5})
    assert shown(client, "Full experts", label) == about({"2": 2.5})


def test_the_rule_of_the_alert_names_the_slow_rank_with_its_delay(client: httpx.Client) -> None:
    rules = {r.get("record"): r["expr"] for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]}
    recorded = "llmtrace:rank_collectives:ratio_rate5m"
    query = rules["llmtrace:rank_straggling:ratio_rate5m"].replace(recorded, f"({rules[recorded]})")
    labels = ("llmtrace_rank_world", "llmtrace_rank_node", "llmtrace_step_group", "service_instance_id")
    found = ask(client, query, "llmtrace_role", *labels)
    assert len(found) == 8
    assert found[f"decode {SLOW} node-b g pod-node-b"] == about(DELAY_MS / STEP_MS)
    assert found["decode 0 node-a g pod-node-a"] == about(-DELAY_MS / STEP_MS / 7)


def test_heat_maps_are_drawn(client: httpx.Client, tmp_path: Path) -> None:
    told = ["--prometheus", str(client.base_url), "--out", str(tmp_path), "--minutes", "2", "wide-ep"]
    assert pictures.main(told) == 0
    drawn = (tmp_path / "dashboard-wide-ep.svg").read_text()
    for title in ("Experts by rank", "Collectives by rank", "Load of the experts"):
        assert title in drawn
    assert "mark-rect" in drawn
