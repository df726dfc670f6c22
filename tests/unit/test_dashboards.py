"""The dashboards and what belongs to them: complete, valid for Grafana, up to date, and of declared names only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana import generate
from grafana.board import COLOURS, Board, JaegerTable, Panel, TraceTable, limits
from grafana.dashboards import boards
from grafana.render import VARIABLES
from grafana.series import known_labels, known_series
from grafana.substitute import built_in, defaults, interval, selected, substitute
from llmtrace.scenarios.catalogue import SCENARIOS
from llmtrace.semconv.definitions import registry
from llmtrace.traces.store import traceql

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "grafana" / "alerts" / "llmtrace.yaml"
PROVISIONING = ROOT / "grafana" / "provisioning"
BOARDS = boards()
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
register_default_plugins()


def of(board: Board) -> Any:
    return json.loads((generate.FOLDER / f"{board.uid.removeprefix('llmtrace-')}.json").read_text())


@pytest.fixture(params=BOARDS, ids=lambda board: board.uid)
def board(request: pytest.FixtureRequest) -> Board:
    return request.param  # type: ignore[no-any-return]


def test_each_module_is_a_dashboard() -> None:
    modules = {path.stem for path in (ROOT / "grafana/dashboards").glob("*.py")} - {"__init__"}
    assert len(BOARDS) == len(modules) == len({board.uid for board in BOARDS}) >= 6
    assert {"llmtrace-overview", "llmtrace-engine", "llmtrace-cost", "llmtrace-collector"} <= {b.uid for b in BOARDS}


def test_the_generated_files_are_up_to_date() -> None:
    assert generate.main(["--check"]) == 0


def test_drift_is_refused_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path / "grafana" / "generated")
    assert generate.main(["--check"]) == 1
    assert "make generate" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    written = generate.FOLDER / "overview.json"
    written.write_text(written.read_text().replace("Requests", "Responses", 1))
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    (generate.FOLDER / "mine.json").write_text("{}")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert not (generate.FOLDER / "mine.json").exists()


def test_the_json_is_of_grafanas_schema(board: Board) -> None:
    """The models of Grafana's foundation SDK, which are generated from its schema, read it and lose nothing."""
    given = of(board)
    read = Dashboard.from_json(json.loads(json.dumps(given)))
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == given


def test_panels_have_what_a_reader_needs(board: Board) -> None:
    panels = [p for top in of(board)["panels"] for p in (top.get("panels") or [top])]
    ids = [p["id"] for top in of(board)["panels"] for p in (top, *top.get("panels", []))]
    assert len(ids) == len(set(ids))
    for panel in panels:
        if panel["type"] in ("row", "text"):
            continue
        name = panel["title"]
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), name
        field = panel["fieldConfig"]["defaults"]
        assert field["unit"], name
        assert panel["datasource"]["uid"] in ("${prometheus}", "${tempo}", "${jaeger}"), name
        if panel["datasource"]["type"] == "prometheus":
            assert field["thresholds"]["steps"][0].get("value") is None, name
            assert [t["refId"] for t in panel["targets"]] == sorted({t["refId"] for t in panel["targets"]}), name
            assert all(t["legendFormat"] for t in panel["targets"]), name
    titles = [p["title"] for p in panels]
    assert len(titles) == len(set(titles))


def test_panels_do_not_overlap(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in of(board)["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_a_labels_name_in_a_legend_is_one_that_the_query_keeps(board: Board) -> None:
    for panel in board.panels():
        for query in panel.queries:
            kept = {name.strip() for by in re.findall(r"by \(([^)]*)\)", query.expr) for name in by.split(",")}
            used = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
            assert used <= kept, f"{panel.title}: {query.legend}"
            if panel.endpoint_label:
                assert panel.endpoint_label in kept, panel.title


def test_dashboards_link_to_each_other_and_have_the_variables(board: Board) -> None:
    dashboard = of(board)
    assert [link["tags"] for link in dashboard["links"]] == [["llmtrace"]]
    assert dashboard["links"][0]["includeVars"]
    names = [v["name"] for v in dashboard["templating"]["list"]]
    assert names[:7] == ["prometheus", "tempo", "jaeger", "namespace", "model", "role", "endpoint"]
    types = {v["name"]: v["query"] for v in dashboard["templating"]["list"] if v["type"] == "datasource"}
    assert types == {name: name for name in ("prometheus", "tempo", "jaeger")}


def test_the_engines_dashboard_is_linked_from_panels_by_endpoint() -> None:
    (overview,) = (b for b in BOARDS if b.uid == "llmtrace-overview")
    links = [
        link["url"]
        for panel in of(overview)["panels"]
        for link in panel.get("fieldConfig", {}).get("defaults", {}).get("links", [])
    ]
    assert links
    assert all(url.startswith("/d/llmtrace-engine?") and "var-endpoint=${__field.labels." in url for url in links)


def test_the_variables_names_are_declared() -> None:
    known, labels = known_series(registry()), known_labels(registry())
    for _, _, query, _ in VARIABLES:
        found = re.fullmatch(r"label_values\(([\w:]+)(?:\{(.*)\})?, (\w+)\)", query)
        assert found, query
        assert found[1] in known, query
        assert found[3] in labels, query
        assert set(re.findall(r"(\w+)=~", found[2] or "")) <= labels, query


def trace_tables() -> list[TraceTable]:
    return [table for board in BOARDS for table in board.trace_tables()]


def fields(node: object) -> Iterator[tuple[traceql.Field, object]]:
    """The comparisons of a query: what is compared, and with what."""
    match node:
        case traceql.Spanset(condition=part) | traceql.Not(part=part):
            yield from fields(part)
        case traceql.And(parts=parts) | traceql.Or(parts=parts):
            for part in parts:
                yield from fields(part)
        case traceql.Join(left=left, right=right):
            yield from fields(left)
            yield from fields(right)
        case traceql.Comparison(left=traceql.Field() as field, right=traceql.Constant(value=value)):
            yield field, value


@pytest.mark.parametrize("table", trace_tables(), ids=lambda table: table.title)
def test_traceql_is_of_declared_names_and_the_store_knows_it(table: TraceTable) -> None:
    declared = registry()
    services = {emitter.service for emitter in declared.emitters}
    compared = list(fields(traceql.parse(table.traceql)))
    assert compared
    for field, value in compared:
        if field.scope in ("span", "resource"):
            assert field.name in declared.attributes, field.name
            members = declared.attributes[field.name].members
            assert not members or set(str(value).split("|")) <= {*members}, f"{field.name} = {value}"
        if field == traceql.Field("resource", "service.name"):
            assert set(str(value).split("|")) <= services, value
        if field == traceql.Field("intrinsic", "name"):
            assert any(fnmatchcase(str(value), span.name) for span in declared.spans.values()), value


def test_jaegers_searches_are_of_declared_names() -> None:
    declared = registry()
    tables = [item for board in BOARDS for item in board.items() if isinstance(item, JaegerTable)]
    assert tables
    for table in tables:
        assert any(span.matches(table.service, table.operation) for span in declared.spans.values()), table.title
        for tag in table.tags.split():
            assert tag.partition("=")[0] in {*declared.attributes, "error"}, tag


def test_what_may_be_empty_says_why(board: Board) -> None:
    always = [q for panel in board.panels() for q in panel.queries if not q.may_be_empty]
    reasons = [q.may_be_empty for panel in board.panels() for q in panel.queries if q.may_be_empty]
    assert len(always) > len(reasons)
    assert all(len(reason.split()) > 3 for reason in reasons)


def test_every_alert_has_its_runbook() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    page = (ROOT / "docs/runbooks.md").read_text()
    sections = re.findall(r"^## (LLM\w+)$", page, re.MULTILINE)
    assert sections == list(dict.fromkeys(rule["alert"] for rule in alerts))
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, rule["alert"]
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert rule["for"]
    for section in re.split(r"^## LLM\w+$", page, flags=re.MULTILINE)[1:]:
        assert [w for w in ("**Means.**", "**Look.**", "**Do.**") if w not in section] == []


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tested = yaml.safe_load(ALERTS.with_suffix(".test.yaml").read_text())["tests"]
    fired = {c["alertname"] for test in tested for c in test["alert_rule_test"] if c["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES if "alert" in rule}


def test_data_sources_lead_to_each_other() -> None:
    found = [
        source
        for path in sorted((PROVISIONING / "datasources").glob("*.yaml"))
        for source in yaml.safe_load(path.read_text())["datasources"]
    ]
    sources = {source["uid"]: source for source in found}
    assert {s["type"] for s in found} == {"prometheus", "tempo", "jaeger"}
    (exemplar,) = sources["llmtrace-prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert (exemplar["name"], exemplar["datasourceUid"]) == ("trace_id", "$LLMTRACE_TRACES")
    for uid in ("llmtrace-tempo", "llmtrace-jaeger"):
        metrics = sources[uid]["jsonData"]["tracesToMetrics"]
        assert metrics["datasourceUid"] == "llmtrace-prometheus"
        # Grafana takes a single dollar sign for a variable of its environment.
        assert all("$$__tags" in query["query"] for query in metrics["queries"])
    tags = {
        "llmtrace-tempo": '[{"key":"service.name","value":"vllm"},{"key":"service.instance.id","value":"decode-0"}]',
        "llmtrace-jaeger": '[{"key":"host.name","type":"string","value":"node"},'
        '{"key":"service.instance.id","type":"string","value":"decode-0"}]',
    }
    for uid, told in tags.items():
        (engine,) = sources[uid]["correlations"]
        assert engine["config"]["target"]["url"] == "/d/llmtrace-engine?var-endpoint=$${endpoint}"
        (transformation,) = engine["config"]["transformations"]
        matched = re.search(transformation["expression"], told)
        assert matched
        assert matched[1] == "decode-0"


def test_the_docs_show_every_dashboard(board: Board) -> None:
    page = (ROOT / "docs/dashboards.md").read_text()
    name = board.uid.removeprefix("llmtrace-")
    assert board.title.removeprefix("LLM inference: ").lower() in page.lower()
    assert f"images/dashboard-{name}.svg" in page


def test_a_panel_has_limits_or_says_why_not(board: Board) -> None:
    for panel in board.panels():
        assert bool(panel.thresholds) != bool(panel.no_limit), panel.title
        if panel.kind == "heatmap":
            assert panel.no_limit == COLOURS, panel.title
    assert any(panel.thresholds for panel in board.panels())
    assert all(len(panel.no_limit.split()) > 3 for panel in board.panels() if panel.no_limit)


def test_limits_go_both_ways() -> None:
    assert [color for _, color in limits(1, 2)] == ["green", "yellow", "red"]
    assert [color for _, color in limits(0.5, 0.2)] == ["red", "yellow", "green"]
    assert [value for value, _ in limits(0.5, 0.2)][1:] == [0.2, 0.5]


def test_variables_are_replaced_as_grafana_does_it() -> None:
    values = built_in(step_s=15, scrape_s=5, range_s=900) | {"role": selected(["prefill", "decode"]), "model": ".*"}
    given = 'x{role=~"$role",model=~"${model}",m=~"${model:regex}"}[$__rate_interval] offset $__range'
    assert substitute(given, values) == 'x{role=~"(prefill|decode)",model=~".*",m=~".*"}[20s] offset 900s'
    assert interval(step_s=60, scrape_s=15) == 75
    assert interval(step_s=15, scrape_s=15) == 60
    assert selected(["a.b"]) == r"a\\.b"
    with pytest.raises(KeyError, match="unknown"):
        substitute("$unknown", values)


def test_defaults_are_what_a_dashboard_opens_with() -> None:
    (cost,) = (b for b in BOARDS if b.uid == "llmtrace-cost")
    found = defaults(of(cost))
    assert found["role"] == ".*"
    assert (found["price"], found["accelerators"]) == ("2.50", "1")


def test_every_panel_is_of_a_scenario(board: Board) -> None:
    assert set(board.scenarios) <= set(SCENARIOS)
    for item in board.items():
        if isinstance(item, Panel) and item.scenario:
            assert item.scenario in board.scenarios, item.title
