"""Every PromQL of a dashboard, an alert or a data source is understood by Prometheus and is of declared names only.

Prometheus's own parser tells which names a query has (/api/v1/parse_query).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2 as otlp
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from parsed_promql import nodes
from prometheus_process import prometheus, promtool

from grafana import pictures
from grafana.dashboards import boards
from grafana.generate import FOLDER
from grafana.series import known_labels, known_series
from grafana.substitute import built_in, defaults, substitute
from llmtrace.semconv.definitions import registry

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "grafana" / "alerts"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with prometheus(tmp_path_factory.mktemp("prometheus")) as running:
        yield running


def of_panels() -> dict[str, str]:
    """Every query of every dashboard by where it is, as Grafana would send it."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(path.read_text())
        values = defaults(dashboard) | built_in(15, 5, 900)
        for _, panel in pictures.panels(dashboard):
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = substitute(target["expr"], values)
    return found


def of_rules() -> tuple[dict[str, str], set[str]]:
    """The queries of the rules by their names, and the series that they record."""
    rules = [r for g in yaml.safe_load((ALERTS / "llmtrace.yaml").read_text())["groups"] for r in g["rules"]]
    named = {f"{r.get('alert', r.get('record'))} {n}": r["expr"] for n, r in enumerate(rules)}
    return named, {r["record"] for r in rules if "record" in r}


def of_data_sources() -> dict[str, str]:
    """The queries that lead from a span to metrics, with the label that their tags give."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "grafana/provisioning/datasources").glob("*.yaml")):
        for source in yaml.safe_load(path.read_text())["datasources"]:
            metrics = source["jsonData"].get("tracesToMetrics", {"tags": [], "queries": []})
            tags = ",".join(f'{tag["value"]}="x"' for tag in metrics["tags"])
            for query in metrics["queries"]:
                found[f"{path.stem}: {query['name']}"] = query["query"].replace("$$__tags", tags)
    return found


def test_every_query_parses_and_is_of_declared_names(client: httpx.Client) -> None:
    rules, recorded = of_rules()
    queries = of_panels() | rules | of_data_sources()
    assert len(queries) > 100
    series, labels = known_series(registry()) | recorded, known_labels(registry())
    used: set[str] = set()
    for where, query in queries.items():
        answer = client.post("/api/v1/parse_query", data={"query": query}).json()
        assert answer["status"] == "success", f"{where}: {answer}"
        for node in nodes(answer["data"]):
            if node.get("type") in ("vectorSelector", "matrixSelector"):
                assert node["name"] in series, f"{where}: {node['name']}"
                used.add(node["name"])
                assert {m["name"] for m in node["matchers"]} <= labels, where
            if node.get("type") == "aggregation":
                assert set(node["grouping"] or ()) <= labels, where
    assert {"llmtrace_span_duration_seconds_bucket", "vllm:nixl_bytes_transferred_sum", "up"} <= used


def test_the_alerts_tests_pass_and_fail_without_the_alert(tmp_path: Path) -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS / "llmtrace.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = promtool("test", "rules", ALERTS / "llmtrace.test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(ALERTS / "llmtrace.test.yaml", tmp_path)
    rules = yaml.safe_load((ALERTS / "llmtrace.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = f"({rule['expr']}) and on () vector(1) < 0"
    (tmp_path / "llmtrace.yaml").write_text(yaml.safe_dump(rules))
    broken = promtool("test", "rules", tmp_path / "llmtrace.test.yaml")
    assert broken.returncode == 1
    named = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    said = broken.stdout + broken.stderr
    assert [alert for alert in named if alert not in said] == []


START_S = int(time.time()) - 900
SECONDS = range(0, 900, 15)
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5)


def attributes(**values: str) -> list[KeyValue]:
    return [KeyValue(key=k.replace("__", "."), value=AnyValue(string_value=v)) for k, v in values.items()]


def histogram(name: str, second: int, seconds: float, **labels: str) -> otlp.Metric:
    """A cumulative histogram of one observation of ``seconds`` per second."""
    place = next((n for n, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
    counts = [second if n == place else 0 for n in range(len(BOUNDS) + 1)]
    point = otlp.HistogramDataPoint(
        attributes=attributes(**labels),
        start_time_unix_nano=START_S * 10**9,
        time_unix_nano=(START_S + second) * 10**9,
        count=second,
        sum=seconds * second,
        bucket_counts=counts,
        explicit_bounds=BOUNDS,
    )
    cumulative = otlp.AGGREGATION_TEMPORALITY_CUMULATIVE
    return otlp.Metric(
        name=name, unit="s", histogram=otlp.Histogram(data_points=[point], aggregation_temporality=cumulative)
    )


def send(client: httpx.Client, resources: list[otlp.ResourceMetrics]) -> None:
    body = ExportMetricsServiceRequest(resource_metrics=resources).SerializeToString()
    answer = client.post("/api/v1/otlp/v1/metrics", content=body, headers={"content-type": "application/x-protobuf"})
    assert answer.status_code < 300, answer.text


def push(client: httpx.Client) -> None:
    """Fifteen minutes of two model servers' first tokens, cached and not, and of the picker's spans."""
    ttft = "gen_ai.server.time_to_first_token"
    for second in SECONDS:
        resources = [
            otlp.ResourceMetrics(
                resource=Resource(attributes=attributes(service__name="vllm", service__instance__id=server)),
                scope_metrics=[
                    otlp.ScopeMetrics(
                        metrics=[
                            histogram(ttft, second, 0.2, llmtrace__prompt__cached="most"),
                            histogram(ttft, second, 0.8, llmtrace__prompt__cached="none"),
                        ]
                    )
                ],
            )
            for server in ("vllm-0", "vllm-1")
        ]
        picker = Resource(attributes=attributes(service__name="llm-d-epp", service__instance__id="random"))
        span = histogram("llmtrace.span.duration", second, 2.0, span__name="gateway.request")
        resources.append(otlp.ResourceMetrics(resource=picker, scope_metrics=[otlp.ScopeMetrics(metrics=[span])]))
        send(client, resources)


def test_pushed_series_come_back_by_the_dashboards_queries_and_are_drawn(
    client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(client)
    (board,) = (b for b in boards() if b.uid == "llmtrace-prefix-cache")
    (panel,) = (p for p in board.panels() if p.title == "TTFT, cached against uncached")
    dashboard = json.loads((FOLDER / "prefix-cache.json").read_text())
    values = defaults(dashboard) | built_in(15, 5, 900)
    (query,) = panel.queries
    answer = client.post(
        "/api/v1/query", data={"query": substitute(query.expr, values), "time": START_S + SECONDS[-1]}
    ).json()
    found = {r["metric"]["llmtrace_prompt_cached"]: float(r["value"][1]) for r in answer["data"]["result"]}
    assert found == {"most": pytest.approx(0.175), "none": pytest.approx(0.75)}

    end = str(START_S + SECONDS[-1])
    url = str(client.base_url)
    told = ["--prometheus", url, "--out", str(tmp_path), "--end", end, "--minutes", "14", "prefix-cache", "overview"]
    assert pictures.main(told) == 0
    drawn = (tmp_path / "dashboard-prefix-cache.svg").read_text()
    assert "TTFT, cached against uncached" in drawn
    assert "vllm-1 none" in drawn
    assert "No data" in drawn
    assert (tmp_path / "dashboard-overview.svg").is_file()
    assert pictures.main([*told[:-2], "nothing"]) == 2
    assert "no dashboard nothing" in capsys.readouterr().err
    assert pictures.main(["--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path), "engine"]) == 2
    assert "did not answer" in capsys.readouterr().err


def test_the_first_error_of_a_kind_counts(client: httpx.Client) -> None:
    """Its series begins with it; Prometheus puts a 0 at the start that the Collector tells."""
    now = time.time_ns()
    point = otlp.NumberDataPoint(
        attributes=attributes(span__name="gateway.request", status__code="STATUS_CODE_ERROR"),
        start_time_unix_nano=now - 5 * 10**9,
        time_unix_nano=now,
        as_int=3,
    )
    cumulative = otlp.AGGREGATION_TEMPORALITY_CUMULATIVE
    calls = otlp.Metric(
        name="llmtrace.span.calls",
        sum=otlp.Sum(data_points=[point], is_monotonic=True, aggregation_temporality=cumulative),
    )
    picker = Resource(attributes=attributes(service__name="llm-d-epp", service__instance__id="first-error"))
    send(client, [otlp.ResourceMetrics(resource=picker, scope_metrics=[otlp.ScopeMetrics(metrics=[calls])])])
    query = 'increase(llmtrace_span_calls_total{service_instance_id="first-error"}[20s])'
    (found,) = client.post("/api/v1/query", data={"query": query, "time": now / 1e9}).json()["data"]["result"]
    assert float(found["value"][1]) >= 3


def test_a_pictures_legend_is_grafanas() -> None:
    assert pictures.legend("p95 {{role}} {{ instance }}", {"role": "decode"}) == "p95 decode"
