"""The prefix-cache answer as one HTML file that needs nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

import altair as alt

from llmtrace.scenarios.page import checks_table, escaped, page, plots, table
from llmtrace.scenarios.prefix_cache.answer import ArmAnswer, PrefixCacheAnswer
from llmtrace.stats import Distribution

COLOURS = {"prefix-aware": "#1b7f79", "random": "#c8553d"}


def prefix_cache_html(found: PrefixCacheAnswer) -> str:
    """The whole report: verdict, plots, tables, missed decisions with their trace ids, checks."""
    chart = alt.hconcat(_ttft(found), _shares(found.arms), spacing=40).resolve_scale(color="shared")
    title = f"prefix-cache, run {found.run_id}"
    parts = [
        f"<p>Model {escaped(found.model)}, llmtrace {escaped(version('llmtrace'))}. All numbers are from traces.</p>",
        f'<p class="verdict">{escaped(found.verdict)}</p>',
        plots(chart),
        "<h2>Prompt tokens from the cache</h2>",
        _endpoints(found.arms),
        "<h2>Latency in milliseconds</h2>",
        _latencies(found.arms),
        "<h2>Decisions that missed a warmer endpoint</h2>",
        *(f"<p>{escaped(_missed_sentence(arm))}</p>" for arm in found.arms),
        _missed(found),
        "<h2>Do the sources agree?</h2>",
        checks_table(found.checks),
        *(f"<p>Note: {escaped(note)}.</p>" for note in found.notes),
    ]
    return page(title, parts)


def _ttft(found: PrefixCacheAnswer) -> alt.LayerChart | alt.FacetChart:
    rows = [
        {
            "random": p.baseline_ms,
            "prefix-aware": p.candidate_ms,
            "tenant": p.tenant,
            "turn": p.turn,
            "pair": p.pair_id,
        }
        for p in found.pairs
    ]
    top = max((max(p.baseline_ms, p.candidate_ms) for p in found.pairs), default=1.0)
    points = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, size=55, opacity=0.7)
        .encode(
            x=alt.X("random:Q", title="TTFT with random routing, ms"),
            y=alt.Y("prefix-aware:Q", title="TTFT with prefix-aware routing, ms"),
            shape=alt.Shape("turn:N", title="turn"),
            tooltip=["pair:N", "tenant:N", "turn:N", "random:Q", "prefix-aware:Q"],
        )
    )
    line = (
        alt.Chart(alt.InlineData(values=[{"x": 0.0, "y": 0.0}, {"x": top, "y": top}]))
        .mark_line(strokeDash=[4, 4], color="#888")
        .encode(x="x:Q", y="y:Q")
    )
    title = "Each request in both arms (below the line: faster when prefix-aware)"
    return alt.layer(line, points).properties(width=430, height=380, title=title)


def _shares(arms: Iterable[ArmAnswer]) -> alt.Chart:
    rows = [
        {
            "arm": arm.arm,
            "endpoint": e.endpoint,
            "share": e.hit_share,
            "cached": e.cached_tokens,
            "prompt": e.prompt_tokens,
        }
        for arm in arms
        for e in arm.endpoints
    ]
    scale = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("endpoint:N", title=None, axis=alt.Axis(labelAngle=0)),
            xOffset="arm:N",
            y=alt.Y(
                "share:Q",
                title="prompt tokens from the cache",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1]),
            ),
            color=alt.Color("arm:N", scale=scale),
            tooltip=["arm:N", "endpoint:N", "cached:Q", "prompt:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=320, height=380, title="Cache hit share by endpoint")
    )
    return chart


def _endpoints(arms: Iterable[ArmAnswer]) -> str:
    return table(
        ["arm", "endpoint", "requests", "prompt tokens", "cached tokens", "hit share", "vLLM's counter"],
        [
            (
                arm.arm,
                e.endpoint,
                f"{e.requests}",
                f"{e.prompt_tokens:,}",
                f"{e.cached_tokens:,}",
                f"{e.hit_share:.1%}",
                "-" if e.counter_hits is None else f"{e.counter_hits:,}",
            )
            for arm in arms
            for e in arm.endpoints
        ],
    )


def _latencies(arms: Iterable[ArmAnswer]) -> str:
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        measures: dict[str, Distribution | None] = {
            "TTFT, client": arm.ttft,
            "TTFT, client, first turns": arm.ttft_first_turns,
            "TTFT, client, later turns": arm.ttft_later_turns,
            "TTFT, gateway": arm.ttft_gateway,
            "TTFT, vLLM": arm.ttft_server,
            "TPOT": arm.tpot,
        }
        rows += [
            (arm.arm, name, f"{d.n}", f"{d.mean:.1f}", f"{d.p50:.1f}", f"{d.p95:.1f}")
            for name, d in measures.items()
            if d is not None
        ]
    return table(["arm", "measure", "requests", "mean", "p50", "p95"], rows)


def _missed_sentence(arm: ArmAnswer) -> str:
    return (
        f"{arm.arm}: {arm.missed_decisions} of {arm.requests} requests missed a warmer endpoint, "
        f"{arm.avoidable_tokens:,} avoidable prefill tokens."
    )


def _missed(found: PrefixCacheAnswer) -> str:
    return table(
        [
            "trace",
            "arm",
            "chosen",
            "cached there",
            "warmer",
            "cached there",
            "avoidable tokens",
            "why",
            "known from",
        ],
        [
            (
                m.trace_id,
                m.arm,
                m.chosen,
                f"{m.cached_tokens}",
                m.warmer,
                f"{m.warmer_tokens}",
                f"{m.avoidable_tokens}",
                m.reason,
                m.source,
            )
            for m in found.missed
        ],
    )
