"""The prefix-cache answer as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.scenarios.prefix_cache.answer import ArmAnswer, PrefixCacheAnswer
from llmtrace.scenarios.prefix_cache.routing import MissedDecision
from llmtrace.scenarios.text import check_text
from llmtrace.stats import Distribution

MOST_MISSED = 8
"""Missed decisions that the terminal shows; --json and --html have them all."""


def answer_text(found: PrefixCacheAnswer) -> Iterator[RenderableType]:
    """The answer, part by part."""
    yield Text.assemble(("prefix-cache", "bold"), f"  run {found.run_id}  model {found.model}")
    yield Text()
    yield Text("How many prompt tokens came from the cache, by endpoint?", style="bold")
    yield _endpoints(found.arms)
    yield Text()
    yield Text("Does prefix-aware routing improve time to first token on the same requests?", style="bold")
    yield _latencies(found.arms)
    yield Text(found.verdict, style=_style(found))
    yield Text()
    yield Text("Which decisions missed a warmer endpoint?", style="bold")
    for arm in found.arms:
        yield Text(
            f"{arm.arm}: {arm.missed_decisions} of {arm.requests} requests, "
            f"{arm.avoidable_tokens:,} avoidable prefill tokens"
        )
    if found.missed:
        yield _missed(found.missed[:MOST_MISSED])
    if len(found.missed) > MOST_MISSED:
        yield Text(f"... and {len(found.missed) - MOST_MISSED} more (--json or --html)", style="dim")
    yield Text()
    yield Text("Do the sources agree?", style="bold")
    for check in found.checks:
        yield check_text(check)
    for note in found.notes:
        yield Text(f"note: {note}", style="yellow")


def _style(found: PrefixCacheAnswer) -> str:
    conclusion = found.comparison.conclusion if found.comparison else "not supported"
    return {"improvement": "bold green", "regression": "bold red"}.get(conclusion, "bold yellow")


def _endpoints(arms: list[ArmAnswer]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("arm")
    table.add_column("endpoint")
    for name in ("requests", "prompt tokens", "cached", "hit share", "vLLM's counter"):
        table.add_column(name, justify="right")
    for arm in arms:
        for e in arm.endpoints:
            counter = "-" if e.counter_hits is None else f"{e.counter_hits:,}"
            row = (
                str(e.requests),
                f"{e.prompt_tokens:,}",
                f"{e.cached_tokens:,}",
                f"{e.hit_share:.0%}",
                counter,
            )
            table.add_row(arm.arm, e.endpoint, *row)
        total = (
            str(arm.requests),
            f"{arm.prompt_tokens:,}",
            f"{arm.cached_tokens:,}",
            f"{arm.hit_share:.0%}",
            "",
        )
        table.add_row(arm.arm, "all", *total, style="bold")
    return table


def _latencies(arms: list[ArmAnswer]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ms")
    for arm in arms:
        for name in ("mean", "p50", "p95"):
            table.add_column(f"{arm.arm} {name}", justify="right")

    def row(name: str, *distributions: Distribution | None) -> None:
        cells = [(f"{d.mean:.0f}", f"{d.p50:.0f}", f"{d.p95:.0f}") if d else ("-", "-", "-") for d in distributions]
        table.add_row(name, *(cell for triple in cells for cell in triple))

    row("TTFT, client", *(arm.ttft for arm in arms))
    row("  first turns", *(arm.ttft_first_turns for arm in arms))
    row("  later turns", *(arm.ttft_later_turns for arm in arms))
    row("TTFT, gateway", *(arm.ttft_gateway for arm in arms))
    row("TTFT, vLLM", *(arm.ttft_server for arm in arms))
    row("TPOT", *(arm.tpot for arm in arms))
    return table


def _missed(missed: list[MissedDecision]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("trace", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    table.add_column("warmer", no_wrap=True)
    table.add_column("avoidable", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for m in missed:
        why = m.reason if m.source == "picker" else f"{m.reason} [derived]"
        chosen, warmer = f"{m.chosen} ({m.cached_tokens})", f"{m.warmer} ({m.warmer_tokens})"
        table.add_row(m.trace_id, m.arm, chosen, warmer, str(m.avoidable_tokens), Text(why))
    return table
