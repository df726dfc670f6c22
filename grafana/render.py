"""Grafana's JSON of a dashboard, by the foundation SDK."""

from __future__ import annotations

import json

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, tempo, text, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.runtime import UnknownDataquery
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import text as text_models

from grafana.board import GREEN, Board, Item, JaegerTable, Note, Panel, Query, Row, TextVariable, Thresholds, TraceTable

TAG = "llmtrace"
ENGINE = "llmtrace-engine"
PROMETHEUS = models.DataSourceRef("prometheus", "${prometheus}")
TEMPO = models.DataSourceRef("tempo", "${tempo}")
JAEGER = models.DataSourceRef("jaeger", "${jaeger}")
TRACES_SHOWN = 20
VARIABLES = (
    ("namespace", "Namespace", "label_values(llmtrace_span_calls_total, k8s_namespace_name)", "Kubernetes namespace"),
    ("model", "Model", "label_values(vllm:num_requests_running, model_name)", "Model that requests name"),
    (
        "role",
        "Role",
        'label_values(vllm:num_requests_running{model_name=~"$model"}, role)',
        "Role of model servers: prefill, decode or both",
    ),
    (
        "endpoint",
        "Endpoint",
        'label_values(vllm:num_requests_running{model_name=~"$model",role=~"$role"}, instance)',
        "Model server",
    ),
)
"""Name, label, query and description of the variables that every dashboard has, each dependent on those before it."""
PanelBuilder = timeseries.Panel | stat.Panel | heatmap.Panel


def to_json(board: Board) -> str:
    """The text of a dashboard's file."""
    return json.dumps(build(board), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def build(board: Board) -> models.Dashboard:
    """The dashboard as the SDK's model; every panel has an id."""
    made = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("LLM inference")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
        .variables([*_datasources(), *_selections(), *(_text_variable(v) for v in board.variables)])
    )
    number = 1
    for row in board.rows:
        number = _add_row(made, row, number)
    return made.build()


def _add_row(made: builders.Dashboard, row: Row, number: int) -> int:
    header = builders.Row(row.title).id(number).collapsed(row.collapsed)
    panels = [_panel(item).id(number + place) for place, item in enumerate(row.items, start=1)]
    if row.collapsed:
        for panel in panels:
            header.with_panel(panel)
        made.with_row(header)
    else:
        made.with_row(header)
        for panel in panels:
            made.with_panel(panel)
    return number + 1 + len(panels)


def _datasources() -> list[Builder[models.VariableModel]]:
    told = (
        ("prometheus", "Metrics", models.VariableHide.DONT_HIDE),
        ("tempo", "Traces", models.VariableHide.DONT_HIDE),
        ("jaeger", "Traces (Jaeger)", models.VariableHide.DONT_HIDE),
    )
    return [builders.DatasourceVariable(name).label(label).type(name).hide(hide) for name, label, hide in told]


def _selections() -> list[Builder[models.VariableModel]]:
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    return [
        builders.QueryVariable(name)
        .label(label)
        .description(description)
        .query(query)
        .datasource(PROMETHEUS)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
        for name, label, query, description in VARIABLES
    ]


def _text_variable(variable: TextVariable) -> Builder[models.VariableModel]:
    return (
        builders.TextBoxVariable(variable.name)
        .label(variable.label)
        .description(variable.description)
        .default_value(variable.default)
        .current(models.VariableOption(selected=True, text=variable.default, value=variable.default))
    )


def _panel(item: Item) -> PanelBuilder | table.Panel | text.Panel:
    match item:
        case Panel():
            return _metrics(item)
        case TraceTable():
            query = tempo.TempoQuery().query_type("traceql").query(item.traceql).limit(TRACES_SHOWN).ref_id("A")
            return _table(item, TEMPO).with_target(query)
        case JaegerTable():
            return _table(item, JAEGER).with_target(_JaegerQuery(item))
        case Note():
            return (
                text.Panel()
                .title(item.title)
                .transparent(True)
                .mode(text_models.TextMode.MARKDOWN)
                .content(item.markdown)
                .span(item.width)
                .height(item.height)
            )


class _JaegerQuery(Builder[UnknownDataquery]):
    """A search in Jaeger; the SDK has no model of it (grafana, public/app/plugins/datasource/jaeger/types.ts)."""

    def __init__(self, item: JaegerTable) -> None:
        told = {
            "service": item.service,
            "operation": item.operation,
            "tags": item.tags,
            "minDuration": item.min_duration,
        }
        self._query = {"refId": "A", "queryType": "search", "limit": TRACES_SHOWN, "datasource": JAEGER.to_json()}
        self._query |= {key: value for key, value in told.items() if value}

    def build(self) -> UnknownDataquery:
        return UnknownDataquery(self._query)


def _table(item: TraceTable | JaegerTable, datasource: models.DataSourceRef) -> table.Panel:
    return (
        table.Panel()
        .show_header(True)
        .title(item.title)
        .description(item.description)
        .datasource(datasource)
        .unit("short")
        .no_value("No such trace in this range")
        .span(item.width)
        .height(item.height)
    )


def _metrics(item: Panel) -> PanelBuilder:
    match item.kind:
        case "stat":
            made: PanelBuilder = _stat()
        case "heatmap":
            made = _heatmap(item)
        case "timeseries":
            made = _timeseries(item)
    made.title(item.title).description(item.description).unit(item.unit).datasource(PROMETHEUS)
    made.span(item.width).height(item.height).min(0).thresholds(_thresholds(item.thresholds))
    if item.maximum is not None:
        made.max(item.maximum)
    if all(query.may_be_empty for query in item.queries):
        made.no_value(f"Nothing: {item.queries[0].may_be_empty}")
    if item.endpoint_label:
        made.data_links([_engine_link(item.endpoint_label)])
    for place, query in enumerate(item.queries):
        made.with_target(_query(query, chr(ord("A") + place), last_value=item.kind == "stat"))
    return made


def _timeseries(item: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(kinds.LegendDisplayMode.TABLE)
        .placement(kinds.LegendPlacement.BOTTOM)
        .calcs(["mean", "max", "lastNotNull"])
    )
    tooltip = common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING)
    made = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).show_points(kinds.VisibilityMode.AUTO)
    if item.stacked:
        made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A")).fill_opacity(40)
    if item.thresholds:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphTresholdsStyleMode.DASHED))
    return made


def _stat() -> stat.Panel:
    return (
        stat.Panel()
        .reduce_options(_last())
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.AREA)
    )


def _heatmap(item: Panel) -> heatmap.Panel:
    colours = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME)
    return (
        heatmap.Panel()
        .calculate(False)
        .color(colours.scheme("Viridis").scale(heatmap_models.HeatmapColorScale.LINEAR).steps(64).min(0))
        .cell_values(heatmap.CellValues().unit(item.unit))
        .y_axis(heatmap.YAxisConfig().reverse(True))
        .scale_distribution(common.ScaleDistributionConfig().type(kinds.ScaleDistribution.LINEAR))
        .show_legend()
        .show_tooltip()
        .hide_y_histogram()
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)


def _thresholds(steps: Thresholds) -> builders.ThresholdsConfig:
    steps = steps or ((float("-inf"), GREEN),)
    made = [models.Threshold(None if value == float("-inf") else value, color) for value, color in steps]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def _query(query: Query, ref_id: str, *, last_value: bool) -> prometheus.Dataquery:
    made = (
        prometheus.Dataquery()
        .expr(query.expr)
        .legend_format(query.legend)
        .exemplar(query.exemplars)
        .ref_id(ref_id)
        .range()
    )
    return made.instant() if last_value and "$__range" in query.expr else made


def _engine_link(label: str) -> builders.DashboardLink:
    url = f"/d/{ENGINE}?${{__url_time_range}}&var-endpoint=${{__field.labels.{label}}}&${{prometheus:queryparam}}"
    return builders.DashboardLink("Engine of ${__field.labels." + label + "}").url(url)
