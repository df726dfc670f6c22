"""Draws the data of each dashboard: ``python -m grafana.pictures --prometheus URL --out docs/images``.

It reads the queries from the generated JSON, asks a Prometheus, and draws with Altair. The pictures show the data, not
Grafana.
"""

from __future__ import annotations

import argparse
import json
import math
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

STEP_S, SCRAPE_S = 15, 5
COLUMN_PX, HEIGHT_PX = 40, 130
FORMATS = {"percentunit": ("%", ""), "s": ("~s", "s"), "bytes": ("~s", "B"), "binBps": ("~s", "B/s")}
"""Of Grafana's units, the number format and what follows it; any other unit is a plain number."""
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


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels of a dashboard's JSON that ask Prometheus, those in collapsed rows included."""
    for panel in dashboard["panels"]:
        inner = panel.get("panels") or [panel]
        yield from (p for p in inner if (p.get("datasource") or {}).get("type") == "prometheus")


def legend(template: str, labels: Mapping[str, str]) -> str:
    """The text of a series, as Grafana makes it of ``{{label}}``."""
    for name in {part.split("}}")[0].strip() for part in template.split("{{")[1:]}:
        template = template.replace("{{" + name + "}}", labels.get(name, ""))
    return " ".join(template.split())


def points(client: httpx.Client, target: Mapping[str, Any], values: Mapping[str, str], when: Range) -> list[Point]:
    """The series of one of a panel's queries."""
    query = substitute(target["expr"], values)
    answer = client.post(
        "/api/v1/query_range", data={"query": query, "start": when.start, "end": when.end, "step": STEP_S}
    )
    answer.raise_for_status()
    return [
        Point(at, legend(target["legendFormat"], series["metric"]), float(value))
        for series in answer.json()["data"]["result"]
        for at, value in series["values"]
        if math.isfinite(float(value))
    ]


def picture(client: httpx.Client, dashboard: Mapping[str, Any], when: Range) -> alt.VConcatChart:
    """A dashboard's panels in its own rows and widths."""
    values = defaults(dashboard) | built_in(STEP_S, SCRAPE_S, when.seconds)
    drawn: list[alt.HConcatChart] = []
    for _, line in groupby(panels(dashboard), key=lambda panel: panel["gridPos"]["y"]):
        charts = [
            chart(panel, [p for target in panel["targets"] for p in points(client, target, values, when)])
            for panel in line
        ]
        drawn.append(alt.hconcat(*charts, spacing=24).resolve_scale(color="independent"))
    return (
        alt.vconcat(*drawn, title=alt.TitleParams(dashboard["title"], fontSize=16, anchor="start"))
        .resolve_scale(color="independent")
        .configure_view(stroke="#dddddd")
        .configure_legend(orient="bottom", columns=2, labelLimit=260, title=None, symbolStrokeWidth=2)
        .configure_axis(grid=True, gridColor="#eeeeee", title=None)
    )


def chart(panel: Mapping[str, Any], found: Sequence[Point]) -> alt.LayerChart | alt.Chart:
    """One panel: lines, areas, or the last value."""
    field = panel["fieldConfig"]["defaults"]
    width = max(150, panel["gridPos"]["w"] * COLUMN_PX - 90)
    number, unit = FORMATS.get(field["unit"], ("~s", ""))
    box: dict[str, Any] = {
        "width": width,
        "height": HEIGHT_PX,
        "title": alt.TitleParams(panel["title"], anchor="start", fontSize=12),
    }
    if not found:
        return (
            alt.Chart(alt.Data(values=[{"text": "no data"}]))
            .mark_text(color="#999999")
            .encode(text="text:N")
            .properties(**box)
        )
    rows = [{"time": p.time * 1000, "series": p.series, "value": p.value} for p in found]
    text = f"format(datum.value, '{number}') + '{unit}'"
    if panel["type"] == "stat":
        last = alt.Chart(alt.Data(values=[rows[-1]])).transform_calculate(shown=text.replace("~s", ".3~s"))
        return last.mark_text(fontSize=34).encode(text="shown:N").properties(**box)
    stacked = field.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    base = alt.Chart(alt.Data(values=rows))
    axis = alt.Axis(labelExpr=text, tickCount=4)
    domain = alt.Scale(domainMin=0, **({"domainMax": field["max"]} if "max" in field else {}))
    lines = (base.mark_area(opacity=0.6) if stacked else base.mark_line(strokeWidth=1.5)).encode(
        x=alt.X("time:T", axis=alt.Axis(format="%H:%M", tickCount=5)),
        y=alt.Y("value:Q", axis=axis, scale=domain, stack="zero" if stacked else None),
        color=alt.Color("series:N"),
    )
    top = max(p.value for p in found)
    steps = [s for s in field["thresholds"]["steps"] if s.get("value") is not None and s["value"] <= top * 1.2]
    limits = [{"value": s["value"], "colour": COLOURS[s["color"]]} for s in steps]
    rules = (
        alt.Chart(alt.Data(values=limits))
        .mark_rule(strokeDash=[4, 4])
        .encode(y="value:Q", color=alt.Color("colour:N", scale=None))
    )
    return (alt.layer(lines, rules).resolve_scale(color="independent") if limits else lines).properties(**box)


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
