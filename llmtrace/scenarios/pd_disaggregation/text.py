"""The pd-disaggregation answer as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.scenarios.pd_disaggregation.answer import PdAnswer, ReasonTotal, RequestAnswer
from llmtrace.scenarios.pd_disaggregation.arms import BY_THRESHOLD
from llmtrace.scenarios.pd_disaggregation.faults import way
from llmtrace.scenarios.pd_disaggregation.latency import ArmAnswer, ArmComparison, TtftParts
from llmtrace.scenarios.pd_disaggregation.regret import ReasonRegret
from llmtrace.scenarios.pd_disaggregation.rule import Reason
from llmtrace.scenarios.pd_disaggregation.transfer import TransferTotal
from llmtrace.scenarios.pd_disaggregation.verdict import METRIC_NAMES, threshold_sentence
from llmtrace.scenarios.text import check_text
from llmtrace.stats import Distribution, Interval
from llmtrace.units import bytes_text

MOST_EACH = 3
"""Requests of each reason that the terminal shows; --json and --html have them all."""
CONCLUSIONS = {"improvement": "saves time", "regression": "costs time", "not supported": "not supported"}
LOSSES = {"improvement": "right", "regression": "wrong", "not supported": "not supported"}


def answer_text(found: PdAnswer) -> Iterator[RenderableType]:
    """The answer, part by part."""
    yield Text.assemble(("pd-disaggregation", "bold"), f"  run {found.run_id}  model {found.model}")
    yield Text()
    yield Text("How was each request served, and why?", style="bold")
    yield _reasons(found.reasons)
    mine = [r for r in found.requests if r.arm == BY_THRESHOLD]
    shown = examples(mine)
    for request in shown:
        yield Text.assemble((request.trace_id, "dim"), f"  {request.sentence}")
    if len(mine) > len(shown):
        yield Text(f"... and {len(mine) - len(shown)} more of {BY_THRESHOLD} (--json or --html)", style="dim")
    yield Text()
    yield Text("What did the KV transfer cost?", style="bold")
    yield _transfers(found.transfers) if found.transfers else Text("no KV was transferred")
    yield Text()
    yield Text("Where did the time to first token go?", style="bold")
    yield _parts(found.ttft_parts)
    yield Text()
    yield Text("Did the choices pay off?", style="bold")
    yield _latencies(found.arms)
    yield _comparisons(found.comparisons)
    if found.regrets:
        yield Text("What a choice lost against the other one, for the same requests in the forced arms:")
        yield _regrets(found.regrets)
    for threshold in found.thresholds[1:]:  # the verdict has the first one, that of TTFT
        yield Text(f"{METRIC_NAMES[threshold.metric].capitalize()}: {threshold_sentence(threshold)}")
    yield Text(found.verdict, style="bold green" if found.supported else "bold yellow")
    yield Text()
    yield Text("Do the sources agree?", style="bold")
    for check in found.checks:
        yield check_text(check)
    for note in found.notes:
        yield Text(f"note: {note}", style="yellow")


def examples(requests: Sequence[RequestAnswer]) -> list[RequestAnswer]:
    """Some requests of each reason: those whose choice lost most, then in order of time."""
    groups: dict[tuple[bool, Reason | None], list[RequestAnswer]] = {}
    for r in requests:
        groups.setdefault((r.split, r.reason), []).append(r)
    return [r for g in groups.values() for r in sorted(g, key=lambda r: -(r.lost_ttft_ms or 0.0))[:MOST_EACH]]


def reason_name(reason: Reason | None) -> str:
    """The reason for people."""
    return reason.replace("_", " ") if reason else "unknown"


def interval_text(interval: Interval | None) -> str:
    """An interval of ms with its estimate."""
    if interval is None:
        return "-"
    return f"{interval.estimate:+.0f} ({interval.low:+.0f} to {interval.high:+.0f})"


def _table(texts: Sequence[str], numbers: Sequence[str], *more: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in more:
        table.add_column(name)
    return table


def _middle(found: Distribution | None) -> str:
    return f"{found.p50:.0f}" if found else "-"


def _reasons(totals: Sequence[ReasonTotal]) -> Table:
    numbers = ("requests", "prompt tokens", "not cached", "TTFT p50 ms", "end to end p50 ms")
    table = _table(("arm", "served", "reason"), numbers)
    for t in totals:
        table.add_row(
            t.arm,
            way(t.split),
            reason_name(t.reason),
            str(t.requests),
            f"{t.prompt_tokens:,}",
            f"{t.uncached_tokens:,}",
            _middle(t.ttft),
            _middle(t.e2e),
        )
    return table


def _transfers(totals: Sequence[TransferTotal]) -> Table:
    numbers = ("transfers", "failed", "tokens", "blocks", "bytes", "wait ms p50", "p95", "transfer ms p50", "rate")
    table = _table(("from", "to"), (*numbers, "share of TTFT p50", "p95"))
    for t in totals:
        share = (f"{t.ttft_share.p50:.1%}", f"{t.ttft_share.p95:.1%}") if t.ttft_share else ("-", "-")
        table.add_row(
            t.source,
            t.target,
            str(t.transfers),
            str(t.failed),
            f"{t.tokens:,}",
            "-" if t.blocks is None else f"{t.blocks:,}",
            "-" if t.bytes is None else bytes_text(t.bytes),
            *((f"{t.wait.p50:.0f}", f"{t.wait.p95:.0f}") if t.wait else ("-", "-")),
            f"{t.transfer.p50:.1f}" if t.transfer else "-",
            "-" if t.bytes_per_s is None else f"{bytes_text(t.bytes_per_s)}/s",
            *share,
        )
    return table


def _parts(parts: Sequence[TtftParts]) -> Table:
    columns = {
        "prefill server: queue": "prefill_queue",
        "prefill": "prefill",
        "KV load": "kv_load",
        "decode server: queue": "decode_queue",
        "prefill ": "decode_prefill",
        "rest": "rest",
        "TTFT": "ttft",
    }
    table = _table(("mean ms", "served"), ("requests", *columns))
    for p in parts:
        values = (getattr(p, field) for field in columns.values())
        table.add_row(p.arm, way(p.split), str(p.requests), *(f"{value:.0f}" for value in values))
    return table


def _latencies(arms: Sequence[ArmAnswer]) -> Table:
    table = _table(("ms", "arm"), ("requests", "split", "failed", "mean", "p50", "p95"))
    for name, field in (("TTFT", "ttft"), ("end to end", "e2e"), ("TPOT", "tpot"), ("longest gap", "longest_gap")):
        for arm in arms:
            d: Distribution | None = getattr(arm, field)
            cells = (f"{d.mean:.0f}", f"{d.p50:.0f}", f"{d.p95:.0f}") if d else ("-", "-", "-")
            table.add_row(name, arm.arm, str(arm.requests), str(arm.split), str(arm.failed), *cells)
    return table


def _comparisons(compared: Sequence[ArmComparison]) -> Table:
    table = _table(("same requests", "against", "saves, ms"), ("pairs", "mean (95 % interval)"), "conclusion")
    for c in compared:
        conclusion = CONCLUSIONS[c.conclusion]
        table.add_row(c.candidate, c.baseline, c.metric, str(c.pairs), interval_text(c.saved_ms), conclusion)
    return table


def _regrets(regrets: Sequence[ReasonRegret]) -> Table:
    table = _table(("served", "reason", "lost, ms"), ("requests", "mean (95 % interval)"), "the choice was")
    for r in regrets:
        table.add_row(
            way(r.split),
            reason_name(r.reason),
            METRIC_NAMES[r.metric],
            str(r.requests),
            interval_text(r.lost_ms),
            LOSSES[r.conclusion],
        )
    return table
