"""Draws the data of each dashboard: ``python -m grafana.pictures --prometheus URL --out docs/images``.

It reads the queries from the generated JSON, asks a Prometheus, and draws with Altair. The pictures show the data, not
Grafana.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import altair as alt
import httpx

from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute

SCRAPE_S, MOST_POINTS = 5, 100
COLUMN_PX, HEIGHT_PX, GAP_PX, AXIS_PX = 50, 130, 20, 50
NUMBERS = {
    "percentunit": "format({0}, '.2~%')",
    "s": "{0} < 300 ? format({0}, '.3~s') + 's' : format({0} / 60, '.3~r') + ' min'",
    "bytes": "format({0}, '.3~s') + 'B'",
    "binBps": "format({0}, '.3~s') + 'B/s'",
}
PLAIN_NUMBER = "format({0}, abs({0}) < 1000 ? '.3~r' : '.3~s')"
"""Vega's expressions for a number in Grafana's units; any other unit is a plain number."""
COLOURS = {"green": "#2e7d32", "yellow": "#f9a825", "red": "#c62828"}


@dataclass(frozen=True)
class Point:
    """One value of a series: seconds since the epoch, the legend's text, the value."""

    time: float
    series: str
    value: float


@dataclass(frozen=True)
class Range:
    """The time that is drawn, in seconds since the epoch."""

    start: float
    end: float

    @property
    def seconds(self) -> int:
        """Its length."""
        return round(self.end - self.start)

    @property
    def step(self) -> int:
        """Seconds between two points of a line."""
        return max(SCRAPE_S, self.seconds // MOST_POINTS)


def panels(dashboard: Mapping[str, Any], *, collapsed: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """The panels of a dashboard's JSON that ask Prometheus, each with its row's title, in collapsed rows or not."""
    row = ""
    for panel in dashboard["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        for inner in panel.get("panels") or [panel]:
            if (inner.get("datasource") or {}).get("type") == "prometheus" and (collapsed or inner is panel):
                yield row, inner


def legend(template: str, labels: Mapping[str, str]) -> str:
    """The text of a series, as Grafana makes it of ``{{label}}``."""
    text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), template)
    return " ".join(text.split())


def points(client: httpx.Client, target: Mapping[str, Any], values: Mapping[str, str], when: Range) -> list[Point]:
    """The series of one of a panel's queries."""
    query = substitute(target["expr"], values)
    answer = client.post(
        "/api/v1/query_range", data={"query": query, "start": when.start, "end": when.end, "step": when.step}
    )
    answer.raise_for_status()
    return [
        Point(at, legend(target["legendFormat"], series["metric"]), float(value))
        for series in answer.json()["data"]["result"]
        for at, value in series["values"]
        if math.isfinite(float(value))
    ]


def picture(client: httpx.Client, dashboard: Mapping[str, Any], when: Range) -> alt.VConcatChart:
    """What one sees of a dashboard when it is opened: its panels in its own rows and widths."""
    values = defaults(dashboard) | built_in(when.step, SCRAPE_S, when.seconds)
    lines: list[alt.HConcatChart] = []
    shown = panels(dashboard, collapsed=False)
    titled = ""
    for (row, _), line in groupby(shown, key=lambda found: (found[0], found[1]["gridPos"]["y"])):
        charts = [
            chart(panel, [p for target in panel["targets"] for p in points(client, target, values, when)], when)
            for _, panel in line
        ]
        title = alt.TitleParams(row if row != titled else "", anchor="start", fontSize=15, offset=12)
        titled = row
        lines.append(alt.hconcat(*charts, spacing=GAP_PX, title=title).resolve_scale(color="independent"))
    whole: alt.VConcatChart = (
        alt.vconcat(*lines, title=alt.TitleParams(dashboard["title"], fontSize=20, anchor="start", offset=16))
        .resolve_scale(color="independent")
        .properties(background="white", padding=16)
        .configure_view(stroke="#dddddd")
        .configure_legend(orient="bottom", direction="vertical", labelLimit=420, title=None, symbolStrokeWidth=2)
        .configure_axis(grid=True, gridColor="#eeeeee", title=None)
    )
    return whole


def chart(panel: Mapping[str, Any], found: Sequence[Point], when: Range) -> alt.LayerChart | alt.Chart:
    """One panel: lines, areas, or the last value. A line goes on over times without a value."""
    field = panel["fieldConfig"]["defaults"]
    single = panel["type"] == "stat"
    box: dict[str, Any] = {
        "width": panel["gridPos"]["w"] * COLUMN_PX - GAP_PX - (0 if single else AXIS_PX),
        "height": HEIGHT_PX / 2 if single else HEIGHT_PX,
        "title": alt.TitleParams(panel["title"], anchor="start", fontSize=12),
    }
    number = NUMBERS.get(field["unit"], PLAIN_NUMBER).format("datum.value")
    steps = [(s["value"] or float("-inf"), COLOURS[s["color"]]) for s in field["thresholds"]["steps"]]
    if not found:
        return _text(field.get("noValue", "No data"), "#999999", 12).properties(**box)
    if single:
        last = found[-1].value
        colour = [colour for limit, colour in steps if last >= limit][-1]
        return _text(alt.ExprRef(number.replace("datum.value", repr(last))), colour, 30).properties(**box)
    drawn = _lines(panel, found, when, number)
    highest = max(p.value for p in found)
    limits = [{"value": limit, "colour": colour} for limit, colour in steps if 0 <= limit <= highest * 1.2]
    if not limits:
        return drawn.properties(**box)
    rules = (
        alt.Chart(alt.InlineData(values=limits))
        .mark_rule(strokeDash=[4, 4])
        .encode(y="value:Q", color=alt.Color("colour:N", scale=None))
    )
    layers: alt.LayerChart = alt.layer(drawn, rules).resolve_scale(color="independent").properties(**box)
    return layers


def _text(text: str | alt.ExprRef, colour: str, size: int) -> alt.Chart:
    drawn: alt.Chart = alt.Chart(alt.InlineData(values=[{}])).mark_text(text=text, color=colour, fontSize=size)
    return drawn


def _lines(panel: Mapping[str, Any], found: Sequence[Point], when: Range, number: str) -> alt.Chart:
    field = panel["fieldConfig"]["defaults"]
    stacked = field.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    rows = [{"time": p.time * 1000, "series": p.series, "value": p.value} for p in found]
    base = alt.Chart(alt.InlineData(values=rows))
    top = {"domainMax": field["max"]} if "max" in field else {}
    if not any(p.value for p in found):
        top.setdefault("domainMax", 1)
    times = alt.Scale(domain=[when.start * 1000, when.end * 1000])
    drawn: alt.Chart = (
        base.mark_area(opacity=0.6, clip=True) if stacked else base.mark_line(strokeWidth=1.5, clip=True)
    ).encode(
        x=alt.X(
            "time:T", axis=alt.Axis(format="%H:%M" if when.seconds > 600 else "%H:%M:%S", tickCount=4), scale=times
        ),
        y=alt.Y(
            "value:Q",
            axis=alt.Axis(labelExpr=number, tickCount=4, minExtent=AXIS_PX - 12, maxExtent=AXIS_PX - 12),
            scale=alt.Scale(domainMin=0, **top),
            stack="zero" if stacked else None,
        ),
        color=alt.Color("series:N"),
    )
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m grafana.pictures", description="Draw the data of the dashboards.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:19099", help="base URL of the Prometheus")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--end", type=float, default=time.time(), help="end of the time drawn, Unix seconds; now")
    parser.add_argument("--minutes", type=int, default=15, help="length of the time drawn")
    parser.add_argument("only", nargs="*", help="dashboards, such as overview; all")
    told = parser.parse_args(arguments)
    paths = [path for path in sorted(FOLDER.glob("*.json")) if not told.only or path.stem in told.only]
    if unknown := set(told.only) - {path.stem for path in paths}:
        print(f"there is no dashboard {min(unknown)} in {FOLDER}", file=sys.stderr)
        return 2
    when = Range(told.end - told.minutes * 60, told.end)
    told.out.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=told.prometheus, timeout=30, trust_env=False) as client:
        for path in paths:
            target = told.out / f"dashboard-{path.stem}.svg"
            try:
                drawn = picture(client, json.loads(path.read_text(encoding="utf-8")), when)
            except httpx.HTTPError as error:
                print(f"Prometheus at {told.prometheus} did not answer a query: {error}", file=sys.stderr)
                return 2
            drawn.save(target)
            print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
