"""The command that compares live traces with the registry of names: conformance."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.errors import UserError
from llmtrace.semconv.conformance import Report, check
from llmtrace.stack import Stack
from llmtrace.traces.model import Trace
from llmtrace.traces.tempo import TempoClient

SETTLE_S = 10.0
"""A trace with a span that ended later than this is left out: more of its spans may be on their way."""
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MIN_WIDTH = 150
"""Columns of output that goes into a file or a pipe."""


def conformance(
    store: Annotated[
        str | None, typer.Option(help="Base URL of the trace store (or of Tempo); default: the stack's.")
    ] = None,
    since: Annotated[str, typer.Option(help="How far to look back: a number and s, m, h or d.")] = "1h",
    limit: Annotated[int, typer.Option(min=1, help="The most traces to check, newest first.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that the traces in the store are as the registry declares them (exit code 1 if not)."""
    seconds = duration_s(since)
    with TempoClient(store or Stack.load().store) as tempo:
        traces, fresh = recent_traces(tempo, seconds, limit)
    if not traces:
        raise UserError(
            f"{tempo.base_url} has no finished traces of the last {since}: run `llmtrace verify` and wait "
            f"{SETTLE_S:g} s, or look further back with --since"
        )
    report = check(traces)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=max(console.width, MIN_WIDTH))
        console.print(conformance_text(report))
        if fresh:
            console.print(f"{fresh} traces are so new that spans may be missing; they were left out")
        if len(traces) + fresh == limit:
            console.print(f"only the newest {limit:,} traces were read; more: --limit")
    if not report.ok:
        raise typer.Exit(1)


def duration_s(text: str) -> int:
    """Seconds of a duration such as 90s, 30m, 1h or 2d."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise UserError(f"{text!r} is no duration; give a number and s, m, h or d, like 30m")
    return int(match[1]) * UNITS_S[match[2]]


def recent_traces(store: TempoClient, since_s: int, limit: int) -> tuple[list[Trace], int]:
    """The traces of the last ``since_s`` seconds, and how many were left out because they may not be complete."""
    now = time.time()
    found = store.search("{}", start_s=max(int(now) - since_s, 0), end_s=int(now) + 1, limit=limit)
    with ThreadPoolExecutor(4) as pool:
        traces = [t for t in pool.map(store.trace, [s.trace_id for s in found]) if t is not None and t.spans]
    settled = [t for t in traces if max(s.end_ns for s in t.spans) <= (now - SETTLE_S) * 1e9]
    return settled, len(traces) - len(settled)


def conformance_text(report: Report) -> RenderableType:
    """The report for the terminal: one line, or a table of what is wrong."""
    checked = f"{report.traces:,} traces, {report.spans:,} spans"
    if report.ok:
        return Text(f"{checked}: all as declared", style="bold green")
    title = f"{checked}: {len(report.findings)} kinds of difference from the registry"
    table = Table(box=None, pad_edge=False, title=title, title_style="bold red", title_justify="left")
    table.add_column("fault", no_wrap=True)
    table.add_column("service", no_wrap=True)
    table.add_column("span")
    table.add_column("what", overflow="fold", ratio=1)
    table.add_column("count", justify="right")
    table.add_column("example trace", no_wrap=True)
    for finding in report.findings:
        texts = (finding.fault, finding.service, finding.span, finding.detail, f"{finding.count:,}", finding.trace_id)
        table.add_row(*(Text(text) for text in texts))
    return table


def mount(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(conformance)
