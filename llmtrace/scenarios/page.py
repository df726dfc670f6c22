"""One HTML file that needs nothing from the network: its frame, and the parts that the reports have in common."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import altair as alt
import vl_convert

from llmtrace.scenarios.checks import Check

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1d2327; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem; border-bottom: 1px solid #dde1e4; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.15rem; border-left: 0.35rem solid #1b7f79; padding-left: 1rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; ``parts`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def plots(chart: alt.HConcatChart | alt.VConcatChart) -> str:
    """The charts with the Vega libraries that draw it inside the page."""
    vega_lite = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    library = vl_convert.javascript_bundle(vl_version=vega_lite)  # type: ignore[call-arg]  # snippet is optional
    spec = chart.to_json(indent=None).replace("<", "\\u003c")
    return (
        f'<div id="plots"></div>\n<script>{library}</script>\n'
        f'<script>vegaEmbed("#plots", {spec}, {{actions: false, mode: "vega-lite"}});</script>'
    )


def escaped(value: object) -> str:
    """The value as text inside HTML."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; short cells that begin with a digit are set as numbers."""

    def cell(tag: str, value: object) -> str:
        numeric = isinstance(value, str) and value[:1].isdigit() and tag == "td" and len(value) < 14
        return f"<{tag}{' class=n' if numeric else ''}>{escaped(value)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", h) for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def checks_table(checks: Iterable[Check]) -> str:
    """The checks as an HTML table."""
    return table(
        ["check", "agrees", "detail", "disagreements"],
        [(c.name, {True: "yes", False: "no", None: "-"}[c.ok], c.detail, "; ".join(c.disagreements)) for c in checks],
    )
