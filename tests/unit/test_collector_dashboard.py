"""The Collector's dashboard over a real gateway that a real Prometheus scrapes: the local stack has no gateway."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
from collecting import Backend, Collector, backend, collecting, spans_of
from loopback import until
from prometheus_process import CONFIGURATION, prometheus

from grafana.board import Query
from grafana.dashboards.collector import BOARD
from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute

SCRAPE_S, STEP_S, RANGE_S = 1, 1, 60
WAIT_S = 60
SCRAPED = """\
scrape_configs:
  - job_name: collector
    metric_name_escaping_scheme: underscores
    scrape_interval: 1s
    static_configs: [{targets: ["127.0.0.1:%d"], labels: {instance: gateway-0}}]
"""
LIMITS = {"SAMPLED_PERCENT": "50", "TRACE_MAX_BYTES": "20000"}


def queries(title: str) -> tuple[Query, ...]:
    (panel,) = (panel for panel in BOARD.panels() if panel.title == title)
    return panel.queries


def of_gateway() -> list[Query]:
    """What a gateway's own metrics answer, but for a queue that it found full: it waits instead."""
    return [
        query
        for panel in BOARD.panels()
        for query in panel.queries
        if "otelcol_" in query.expr and "enqueue_failed" not in query.expr
    ]


def empty(client: httpx.Client, asked: list[Query]) -> list[str]:
    """The legends of the queries that give nothing."""
    dashboard = json.loads((FOLDER / "collector.json").read_text())
    values = defaults(dashboard) | built_in(STEP_S, SCRAPE_S, RANGE_S)
    end = time.time()
    when = {"start": end - RANGE_S, "end": end, "step": STEP_S}
    found = []
    for query in asked:
        answer = client.post("/api/v1/query_range", data={"query": substitute(query.expr, values)} | when)
        if not answer.raise_for_status().json()["data"]["result"]:
            found.append(query.legend)
    return found


def lose_some(collector: Collector, store: Backend) -> None:
    """Send traces of which half are kept, when the backend wants none, and one that is too large."""
    store.http_status, store.refused = httpx.codes.BAD_REQUEST, 0
    assert collector.send(spans_of({"name": "ingress", "attributes": {"note": "x" * 30_000}}))
    assert collector.send(spans_of(*({"name": "ingress"} for _ in range(20))))
    until(lambda: store.refused, "the store refuses what the gateway decided to keep", WAIT_S)
    store.http_status = httpx.codes.OK


def test_every_query_about_a_gateway_has_data(tmp_path: Path) -> None:
    asked = of_gateway()
    assert {*queries("Decisions"), *queries("Traces that wait"), *queries("Traces lost")} <= {*asked}
    with (
        backend() as store,
        collecting("gateway", tmp_path, store, LIMITS) as collector,
        prometheus(tmp_path, CONFIGURATION + SCRAPED % collector.metrics_port) as client,
    ):
        deadline = time.monotonic() + WAIT_S
        while left := empty(client, asked):
            assert time.monotonic() < deadline, left
            lose_some(collector, store)
            assert collector.send(spans_of(*({"name": "ingress"} for _ in range(10))))
            time.sleep(2 * SCRAPE_S)
