"""The pd-disaggregation answer as one HTML file that needs nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import altair as alt

from llmtrace.scenarios.page import checks_table, escaped, page, plots, table
from llmtrace.scenarios.pd_disaggregation.answer import PdAnswer, RequestAnswer
from llmtrace.scenarios.pd_disaggregation.arms import ALWAYS_SPLIT, ARMS, BY_THRESHOLD, NEVER_SPLIT
from llmtrace.scenarios.pd_disaggregation.faults import way
from llmtrace.scenarios.pd_disaggregation.regret import ThresholdAnswer
from llmtrace.scenarios.pd_disaggregation.text import CONCLUSIONS, LOSSES, interval_text, reason_name
from llmtrace.scenarios.pd_disaggregation.verdict import METRIC_NAMES, threshold_sentence
from llmtrace.units import MEGABYTE, bytes_text

WAYS = alt.Scale(domain=["split", "unified"], range=["#1b7f79", "#c8553d"])
WIDTH, HEIGHT = 430, 340


def pd_html(found: PdAnswer) -> str:
    """The whole report: verdict, plots, tables, every request with its trace id, checks."""
    title = f"pd-disaggregation, run {found.run_id}"
    parts = [
        f"<p>Model {escaped(found.model)}, llmtrace {escaped(version('llmtrace'))}. All numbers are from traces.</p>",
        f'<p class="verdict">{escaped(found.verdict)}</p>',
        *(f"<p>{escaped(_threshold(t))}</p>" for t in found.thresholds[1:]),  # the verdict has the first one
        plots(_charts(found)),
        "<h2>How requests were served, and why</h2>",
        _reasons(found),
        "<h2>KV transfer</h2>",
        _transfers(found),
        "<h2>The same requests in two arms</h2>",
        _comparisons(found),
        "<h2>What a choice lost against the other one</h2>",
        _regrets(found),
        "<h2>Every request</h2>",
        _requests(found.requests),
        "<h2>Do the sources agree?</h2>",
        checks_table(found.checks),
        *(f"<p>Note: {escaped(note)}.</p>" for note in found.notes),
    ]
    return page(title, parts)


def _charts(found: PdAnswer) -> alt.VConcatChart:
    rows: list[Any] = [alt.hconcat(_decisions(found), _paired(found), spacing=40)]
    if found.transfers:
        rows.append(_moved(found.requests))
    if found.thresholds:
        rows.append(alt.hconcat(*map(_curve, found.thresholds), spacing=40))
    chart: alt.VConcatChart = alt.vconcat(*rows, spacing=40).resolve_scale(color="independent", shape="independent")
    return chart


def _threshold(found: ThresholdAnswer) -> str:
    return f"{METRIC_NAMES[found.metric].capitalize()}: {threshold_sentence(found)}"


def _decisions(found: PdAnswer) -> alt.Chart:
    rows = [
        {"arm": t.arm, "reason": reason_name(t.reason), "served": way(t.split), "requests": t.requests}
        for t in found.reasons
    ]
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("requests:Q", title="requests"),
            y=alt.Y("reason:N", title=None, axis=alt.Axis(labelLimit=220)),
            row=alt.Row("arm:N", title=None, sort=list(ARMS)),
            color=alt.Color("served:N", scale=WAYS),
            tooltip=["arm:N", "served:N", "reason:N", "requests:Q"],
        )
        .properties(width=WIDTH - 120, height=90, title="Decisions by reason")
    )
    return chart


def _paired(found: PdAnswer) -> alt.LayerChart | alt.FacetChart:
    by_pair: dict[str, dict[str, RequestAnswer]] = {}
    for r in found.requests:
        by_pair.setdefault(r.pair_id, {})[r.arm] = r
    rows = [
        {
            "forced": forced.ttft_ms,
            "by-threshold": mine.ttft_ms,
            "against": arm,
            "served": way(mine.split),
            "pair": pair_id,
            "reason": reason_name(mine.reason),
        }
        for pair_id, arms in by_pair.items()
        for arm in (ALWAYS_SPLIT, NEVER_SPLIT)
        if (mine := arms.get(BY_THRESHOLD)) is not None and (forced := arms.get(arm)) is not None
    ]
    top = max((r.ttft_ms or 0.0 for r in found.requests), default=1.0)
    points = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, size=55, opacity=0.7)
        .encode(
            x=alt.X("forced:Q", title="TTFT in the other arm, ms"),
            y=alt.Y("by-threshold:Q", title="TTFT by threshold, ms"),
            color=alt.Color("served:N", scale=WAYS),
            shape=alt.Shape("against:N", title="other arm"),
            tooltip=["pair:N", "against:N", "served:N", "reason:N", "forced:Q", "by-threshold:Q"],
        )
    )
    line = (
        alt.Chart(alt.InlineData(values=[{"x": 0.0, "y": 0.0}, {"x": top, "y": top}]))
        .mark_line(strokeDash=[4, 4], color="#888")
        .encode(x="x:Q", y="y:Q")
    )
    title = "Each request by threshold and forced (below the line: faster by threshold)"
    return alt.layer(line, points).properties(width=WIDTH, height=HEIGHT, title=title)


def _moved(requests: Iterable[RequestAnswer]) -> alt.Chart:
    rows = [
        {
            "MB": r.kv_bytes / MEGABYTE,
            "ms": r.kv_wait_ms,
            "to": r.decode_server,
            "share": r.kv_wait_ms / r.ttft_ms if r.ttft_ms else None,
            "trace": r.trace_id,
        }
        for r in requests
        if r.kv_bytes is not None and r.kv_wait_ms is not None
    ]
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, size=55, opacity=0.7)
        .encode(
            x=alt.X("MB:Q", title="KV transferred, MB"),
            y=alt.Y("ms:Q", title="wait for it, ms"),
            color=alt.Color("to:N", title="decode server"),
            tooltip=["trace:N", "to:N", "MB:Q", "ms:Q", alt.Tooltip("share:Q", title="of TTFT", format=".1%")],
        )
        .properties(width=WIDTH, height=HEIGHT, title="KV transfers")
    )
    return chart


def _curve(found: ThresholdAnswer) -> alt.LayerChart | alt.FacetChart:
    """Time lost against the best threshold; a step for each set of choices, the last one splits nothing."""
    last = max((c.high or c.low for c in found.curve), default=1)
    rows = [
        {
            "threshold": c.low,
            "until": last * 1.05 if c.high is None else c.high,
            "lost": c.above_best.estimate,
            "low": c.above_best.low,
            "high": c.above_best.high,
            "choices": "never split" if c.high is None else f"split from {c.high:,} uncached tokens",
        }
        for c in found.curve
    ]
    rows.append({**rows[-1], "threshold": rows[-1]["until"]})
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("threshold:Q", title="threshold, uncached tokens (right end: never split)")
    )
    band = base.mark_area(opacity=0.25, interpolate="step-after", color="#1b7f79").encode(y="low:Q", y2="high:Q")
    line = base.mark_line(interpolate="step-after", color="#1b7f79").encode(
        y=alt.Y("lost:Q", title="lost against the best, ms a request"),
        tooltip=["choices:N", "lost:Q", "low:Q", "high:Q"],
    )
    layers: list[alt.Chart] = [band, line]
    if found.configured:
        rule = alt.Chart(alt.InlineData(values=[{"threshold": found.configured, "is": "configured"}]))
        layers.append(rule.mark_rule(strokeDash=[4, 4], color="#c8553d").encode(x="threshold:Q", tooltip=["is:N"]))
    title = f"{METRIC_NAMES[found.metric]} lost, by threshold (95 % band; dashed: configured)"
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=title)


def _reasons(found: PdAnswer) -> str:
    return table(
        ["arm", "served", "reason", "requests", "prompt tokens", "not cached", "TTFT p50, ms", "end to end p50, ms"],
        [
            (
                t.arm,
                way(t.split),
                reason_name(t.reason),
                f"{t.requests}",
                f"{t.prompt_tokens:,}",
                f"{t.uncached_tokens:,}",
                f"{t.ttft.p50:.1f}" if t.ttft else "-",
                f"{t.e2e.p50:.1f}" if t.e2e else "-",
            )
            for t in found.reasons
        ],
    )


def _transfers(found: PdAnswer) -> str:
    return table(
        [
            "from",
            "to",
            "transfers",
            "failed",
            "blocks",
            "bytes",
            "wait p50, ms",
            "p95",
            "transfer p50, ms",
            "of TTFT p50",
        ],
        [
            (
                t.source,
                t.target,
                f"{t.transfers}",
                f"{t.failed}",
                "-" if t.blocks is None else f"{t.blocks:,}",
                "-" if t.bytes is None else bytes_text(t.bytes),
                f"{t.wait.p50:.1f}" if t.wait else "-",
                f"{t.wait.p95:.1f}" if t.wait else "-",
                f"{t.transfer.p50:.1f}" if t.transfer else "-",
                f"{t.ttft_share.p50:.1%}" if t.ttft_share else "-",
            )
            for t in found.transfers
        ],
    )


def _comparisons(found: PdAnswer) -> str:
    return table(
        ["arm", "against", "measure", "pairs", "saves, ms: mean (95 % interval)", "conclusion"],
        [
            (c.candidate, c.baseline, c.metric, f"{c.pairs}", interval_text(c.saved_ms), CONCLUSIONS[c.conclusion])
            for c in found.comparisons
        ],
    )


def _regrets(found: PdAnswer) -> str:
    return table(
        ["served", "reason", "measure", "requests", "lost, ms: mean (95 % interval)", "the choice was"],
        [
            (
                way(r.split),
                reason_name(r.reason),
                METRIC_NAMES[r.metric],
                f"{r.requests}",
                interval_text(r.lost_ms),
                LOSSES[r.conclusion],
            )
            for r in found.regrets
        ],
    )


def _requests(requests: Iterable[RequestAnswer]) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    return table(
        ["trace", "arm", "request", "how and why", "TTFT, ms", "end to end, ms", "lost TTFT, ms"],
        [(r.trace_id, r.arm, r.pair_id, r.sentence, ms(r.ttft_ms), ms(r.e2e_ms), ms(r.lost_ttft_ms)) for r in requests],
    )
