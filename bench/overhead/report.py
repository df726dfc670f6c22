"""The numbers as Markdown tables, for the terminal and for docs/overhead.md alike."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from bench.overhead import analysis
from bench.overhead.analysis import Percentiles
from bench.overhead.plans import (
    BASE,
    COMPARED,
    FULL,
    LADDER,
    NOISE,
    PLUGIN,
    PRESSED,
    VLLM_VERSION,
    Cell,
)
from bench.overhead.rounds import Measured
from llmtrace.errors import UserError
from llmtrace.stats import Interval

GOAL_PERCENT = 1.0
"""Of throughput, off untraced, at 100 % sampling."""
BEGIN, END = "<!-- begin: python -m bench.overhead -->", "<!-- end: python -m bench.overhead -->"

Row = Sequence[str]


def write_into(path: Path, text: str) -> None:
    """Put ``text`` between the markers of the page at ``path``. Raises UserError where they are missing."""
    page = path.read_text()
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} lacks the lines that its tables go between: {BEGIN} and {END}")
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}")


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table, aligned; numbers, that is all but the first column, to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Row) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def interval(value: Interval) -> str:
    return f"{value.estimate:+.1f} % ({value.low:+.1f} to {value.high:+.1f})"


def verdict(measured: Measured) -> str:
    """Whether the goal is met, in one sentence."""
    found = analysis.change(measured, FULL, BASE, analysis.throughput)
    if found.low >= -GOAL_PERCENT:
        means = f"within the goal of {GOAL_PERCENT:.0f} %"
    elif found.high < -GOAL_PERCENT:
        means = f"beyond the goal of {GOAL_PERCENT:.0f} %"
    else:
        means = f"the interval does not decide about the goal of {GOAL_PERCENT:.0f} %"
    return (
        f"{measured.plan.model}: with every request sampled, llmtrace and vLLM's own tracing together change "
        f"throughput by {interval(found)} against no tracing: {means}."
    )


def comparison(measured: Measured) -> str:
    """What each way of tracing changes."""
    plan = measured.plan
    base = analysis.summary(measured, BASE)
    rows = []
    for cell in (*COMPARED[1:], *((NOISE,) if NOISE in plan.cells else ())):
        metrics = (analysis.throughput, analysis.ttft, analysis.tpot, analysis.cpu)
        rows.append([cell.name, *(interval(analysis.change(measured, cell, BASE, metric)) for metric in metrics)])
    added = analysis.change(measured, FULL, COMPARED[1], analysis.throughput)
    return f"""\
**{plan.model}**: {plan.concurrency} requests at a time, {plan.prompt_tokens} prompt and {plan.output_tokens} output
tokens in the mean, {plan.starts * plan.rounds} rounds of {plan.requests} requests, servers started {plan.starts} times.
Without tracing: {base.tokens_per_s:,.0f} tokens/s, TTFT {base.ttft.p50:,.1f} ms and TPOT {base.tpot.p50:.2f} ms
(medians), CPU {base.api_server_ms + base.engine_core_ms:,.1f} ms per request.

{table(["against no tracing", "throughput", "TTFT", "TPOT", "CPU per request"], rows)}

llmtrace against vLLM's own: throughput {interval(added)}."""


def ladder(measured: Measured) -> str:
    """The sampling rates, with percentiles."""
    cells = [BASE, *LADDER, COMPARED[1]]
    found = [analysis.summary(measured, cell) for cell in cells]
    times = table(
        ["", "tokens/s", "latency p50 / p95 / p99", "TTFT p50 / p95 / p99", "TPOT p50 / p95 / p99", "gap p99"],
        [
            [
                "off (no tracing)" if each.cell == BASE else each.cell.name,
                f"{each.tokens_per_s:,.0f}",
                _percentiles(each.latency, 0),
                _percentiles(each.ttft, 1),
                _percentiles(each.tpot, 2),
                f"{each.gap.p99:.1f}",
            ]
            for each in found
        ],
    )
    usage = table(
        ["", "throughput", "CPU engine core", "CPU API server", "memory RSS / PSS", "spans", "exported bytes"],
        [
            [
                "off (no tracing)" if each.cell == BASE else each.cell.name,
                "" if each.cell == BASE else interval(analysis.change(measured, each.cell, BASE, analysis.throughput)),
                f"{each.engine_core_ms:.1f}",
                f"{each.api_server_ms:.1f}",
                _memory(measured, each.cell),
                f"{each.spans:.2f}",
                f"{each.bytes:,.0f}",
            ]
            for each in found
        ],
    )
    return f"{times}\n\n{usage}"


def pressure(measured: Measured) -> str:
    """What a collector that is not well does to the server."""
    rows = []
    for cell in (FULL, *PRESSED):
        lost = analysis.losses(measured, cell.variant, PLUGIN)
        rows.append(
            [
                "llmtrace, collector well" if cell == FULL else cell.variant.name,
                interval(analysis.change(measured, cell, BASE, analysis.throughput)),
                interval(analysis.change(measured, cell, BASE, analysis.tpot)),
                f"{analysis.memory(measured, cell.variant).pss:,.0f}",
                f"{lost.made:,.0f}",
                f"{lost.made - lost.taken:,.0f}",
                f"{lost.log_lines / measured.plan.starts:,.0f}",
            ]
        )
    head = ["", "throughput", "TPOT", "memory PSS", "spans made", "spans lost", "log lines per server"]
    return table(head, rows)


def machine() -> str:
    """Where the numbers come from."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"vLLM {VLLM_VERSION} on CPU, Python {platform.python_version()}, {os.cpu_count()} cores ({model})"


def _percentiles(found: Percentiles, digits: int) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in (found.p50, found.p95, found.p99))


def _memory(measured: Measured, cell: Cell) -> str:
    found = analysis.memory(measured, cell.variant)
    return f"{found.rss:,.0f} / {found.pss:,.0f}"
