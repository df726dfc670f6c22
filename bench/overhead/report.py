"""The numbers as Markdown tables, for the terminal and for docs/overhead.md alike."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from bench.overhead.analysis import Changes, Percentiles, Result
from bench.overhead.engine_loop import Costs
from bench.overhead.live import Live
from bench.overhead.plans import BASE, BUILT_IN_FULL, FULL, LADDER, NOISE, PRESSED, VLLM_VERSION
from llmtrace.errors import UserError
from llmtrace.stats import Interval

GOAL_PERCENT = 1.0
"""Of throughput, off untraced, at 100 % sampling."""
GPU_STEP_MS = 10.0
REQUEST_COSTS_AT = 32
"""Requests running; with one, batches are small, with many, all end at once."""
BEGIN, END = "<!-- begin: python -m bench.overhead -->", "<!-- end: python -m bench.overhead -->"

Row = Sequence[str]
CHANGED = ("throughput", "TTFT", "TPOT", "CPU per request")


def check(path: Path) -> tuple[str, str]:
    """What the page at ``path`` has before and after the tables. Raises UserError where their place is not marked."""
    try:
        head, begin, rest = path.read_text().partition(BEGIN)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} lacks the lines that the tables go between: {BEGIN} and {END}")
    return head, tail


def write_into(path: Path, text: str) -> None:
    """Put ``text`` between the markers of the page at ``path``."""
    head, tail = check(path)
    path.write_text(f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}")


def data(results: Sequence[Result], costs: Sequence[Costs], running: Mapping[str, Live]) -> dict[str, Any]:
    """Everything as JSON takes it."""
    found = {"machine": machine(), "results": results, "engine_loop": costs, "running_server": running}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
    return plain


def _plain(value: object) -> object:
    if isinstance(value, Interval):
        return value.model_dump()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


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


def page(results: Sequence[Result], costs: Sequence[Costs], running: Mapping[str, Live]) -> str:
    """Everything, in the order of docs/overhead.md."""
    parts = [f"Measured with {machine()}.", "\n".join(f"- {verdict(each)}" for each in results)]
    for each in results:
        parts += [f"### {each.plan.model}", comparison(each)]
        if set(LADDER) <= set(each.plan.cells):
            parts += ["#### Sampling", ladder(each)]
        if set(PRESSED) <= set(each.plan.cells):
            parts += ["#### A collector that is not well", pressure(each)]
    parts += ["### In the engine's loop", engine_loop(costs)]
    parts += ["### In a running server", running_server(running)]
    return "\n\n".join(parts)


def verdict(result: Result) -> str:
    """Whether the goal is met, with every request sampled."""
    found = result.against_none[FULL.name].throughput
    text = (
        f"{result.plan.model}, every request sampled: llmtrace and vLLM's own tracing together change throughput by "
        f"{interval(found)} against another server without tracing: {_meaning(found)}."
    )
    if FULL.name in result.against_itself:
        found = result.against_itself[FULL.name].throughput
        text += (
            f" Against the same process with the plugin's hooks taken out and nothing sampled: {interval(found)}: "
            f"{_meaning(found)}."
        )
    return text


def _meaning(found: Interval) -> str:
    if found.low >= -GOAL_PERCENT:
        return f"within the goal of {GOAL_PERCENT:.0f} %"
    if found.high < -GOAL_PERCENT:
        return f"beyond the goal of {GOAL_PERCENT:.0f} %"
    return f"the interval does not decide about the goal of {GOAL_PERCENT:.0f} %"


def comparison(result: Result) -> str:
    """What each way of tracing changes."""
    plan, base = result.plan, result.summaries[BASE.name]
    names = (BUILT_IN_FULL.name, FULL.name, NOISE.name)
    rows = [_changes(name, result.against_none[name]) for name in names if name in result.against_none]
    load = (
        f"{plan.concurrency} requests at a time, {plan.prompt_tokens} prompt tokens and {plan.output_tokens} output "
        f"tokens in the mean; {plan.starts * plan.rounds} rounds of {plan.requests} requests for each row, servers "
        f"started {plan.starts} times. Without tracing: {base.tokens_per_s:,.0f} tokens/s, TTFT {base.ttft.p50:,.1f} "
        f"ms and TPOT {base.tpot.p50:.2f} ms (medians), {base.api_server_ms + base.engine_core_ms:,.1f} ms of CPU per "
        "request."
    )
    parts = [load, table(["against no tracing", *CHANGED], rows)]
    if result.against_itself:
        rows = [_changes(name, found) for name, found in result.against_itself.items()]
        parts.append(table(["against itself, hooks out", *CHANGED], rows))
    parts.append(f"llmtrace against vLLM's own: throughput {interval(result.against_built_in.throughput)}.")
    return "\n\n".join(parts)


def _changes(name: str, found: Changes) -> Row:
    return [name, *(interval(each) for each in (found.throughput, found.ttft, found.tpot, found.cpu))]


def ladder(result: Result) -> str:
    """The sampling rates, with percentiles."""
    names = {BASE.name: "off (no tracing)", BUILT_IN_FULL.name: BUILT_IN_FULL.name}
    names |= {cell.name: cell.name for cell in LADDER}
    found = {label: (result.summaries[name], name) for name, label in names.items()}
    times = table(
        ["ms", "latency p50 / p95 / p99", "TTFT p50 / p95 / p99", "TPOT p50 / p95 / p99", "gap p99"],
        [
            [
                label,
                _percentiles(each.latency, 0),
                _percentiles(each.ttft, 1),
                _percentiles(each.tpot, 2),
                f"{each.gap.p99:.1f}",
            ]
            for label, (each, _) in found.items()
        ],
    )
    usage = table(
        ["per request", "tokens/s", "throughput", "CPU engine core, API server", "RSS, PSS", "spans", "bytes"],
        [
            [
                label,
                f"{each.tokens_per_s:,.0f}",
                "" if name == BASE.name else interval(result.against_none[name].throughput),
                f"{each.engine_core_ms:.2f}, {each.api_server_ms:.2f} ms",
                f"{result.memory[name].rss:,.0f}, {result.memory[name].pss:,.0f} MiB",
                f"{each.spans:.2f}",
                f"{each.bytes:,.0f}",
            ]
            for label, (each, name) in found.items()
        ],
    )
    return f"{times}\n\n{usage}"


def pressure(result: Result) -> str:
    """What a collector that is not well does to the server."""
    rows = []
    for cell in (FULL, *PRESSED):
        changes, lost = result.against_none[cell.name], result.losses[cell.name]
        rows.append(
            [
                "llmtrace, collector well" if cell == FULL else cell.variant.name,
                interval(changes.throughput),
                interval(changes.tpot),
                f"{result.memory[cell.name].pss:,.0f} MiB",
                f"{lost.made:,.0f}",
                f"{lost.lost:,.0f}",
                f"{lost.log_lines:,.0f}",
            ]
        )
    return table(["", "throughput", "TPOT", "PSS", "spans made", "spans lost", "log lines per server"], rows)


def engine_loop(costs: Sequence[Costs]) -> str:
    """The plugin's cost per step, and per request."""
    rows = [
        [
            f"{each.running}",
            f"{each.scheduler:,.0f} µs",
            f"{each.step_unsampled:.1f} µs",
            f"{each.step:.1f} µs",
            f"{each.share(GPU_STEP_MS):.2f} %",
            f"{each.api_step:.1f} µs",
        ]
        for each in costs
    ]
    head = [
        "requests running",
        "vLLM's scheduler",
        "added, 0 %",
        "added, 100 %",
        "of a 10 ms step",
        "API server, 100 %",
    ]
    of = next(each for each in costs if each.running == REQUEST_COSTS_AT)
    per_request = (
        f"Per request, {of.running} running: {of.request:.0f} µs in the engine core; in the API server "
        f"{of.api_request:.0f} µs in its event loop, {of.spans_request:.0f} µs of CPU in the thread that makes the "
        f"spans and {of.export_request - of.own_export_request:.0f} µs in the exporter's. vLLM's own tracing takes "
        f"{of.own_request:.0f} µs in the event loop and {of.own_export_request:.0f} µs in the exporter's thread."
    )
    return f"{table(head, rows)}\n\n{per_request}"


def running_server(running: Mapping[str, Live]) -> str:
    """The hooks of every step, timed in a server that serves."""
    head = ["tiny model, sampled", "engine core", "median", "API server", "step", "engine core's share"]
    rows = [
        [
            share,
            f"{each.engine:.1f} µs",
            f"{each.engine_median:.1f} µs",
            f"{each.api_server:.1f} µs",
            f"{each.step:,.0f} µs",
            f"{each.engine / each.step * 100:.2f} %",
        ]
        for share, each in running.items()
    ]
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
