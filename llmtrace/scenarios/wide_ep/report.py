"""The wide-ep answer as one HTML file that needs nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import altair as alt

from llmtrace.scenarios.page import checks_table, escaped, page, plots, table
from llmtrace.scenarios.wide_ep.answer import StepsAnswer, WideEpAnswer
from llmtrace.scenarios.wide_ep.breakdown import Share

CELL = 18
"""Pixels of a heat map's cell, at most."""
WIDTH, HEIGHT = 520, 420


def wide_ep_html(found: WideEpAnswer) -> str:
    """The whole report: verdict, heat maps, tables, checks."""
    steps = found.steps
    maps: list[alt.Chart] = [_phases(steps)]
    if any(map(any, steps.sent)):
        maps.append(_experts(steps))
    parts = [
        f"<p>Model {escaped(found.model)}, llmtrace {escaped(version('llmtrace'))}. All numbers are from traces.</p>",
        f'<p class="verdict">{escaped(found.verdict)}</p>',
        f"<p>{steps.steps} steps; {steps.on_demand} more, traced for slow requests, count for requests only.</p>",
        *([f"<p>{steps.unknown} of {steps.steps} steps do not say their phases.</p>"] if steps.unknown else []),
        plots(alt.hconcat(*maps, spacing=40).resolve_scale(color="independent")),
        "<h2>Time by rank, mean milliseconds per step</h2>",
        _shares("rank", steps.by_rank, steps),
        "<h2>Time by node</h2>",
        _shares("node", steps.by_node, steps),
        "<h2>Ranks that came last</h2>",
        table(
            ["rank", "node", "pod", "steps", "share", "the others waited, ms", "in all, ms", "slower in"],
            [
                (
                    *(str(s.rank), s.node, s.pod, str(s.steps), f"{s.share:.1%}", f"{s.delay_ms:.2f}"),
                    *(f"{s.total_ms:.0f}", s.phase),
                )
                for s in steps.stragglers
            ],
        ),
        "<h2>Slowest MoE layers</h2>",
        table(["layer", "times", "mean ms"], [(str(x.layer), str(x.times), f"{x.ms:.2f}") for x in steps.layers]),
        "<h2>Requests, sums over their traced steps in milliseconds</h2>",
        table(
            [
                *("trace", "tenant", "rank", "steps", "on demand", "in steps", *steps.parts),
                *("waited", "imbalance", "caused, by tokens"),
            ],
            [
                (
                    *(r.trace_id, r.tenant, str(r.rank), str(r.prefill_steps + r.decode_steps)),
                    *(str(r.on_demand), f"{r.step_ms:.1f}"),
                    *(f"{ms:.1f}" for ms in steps.shown(r.ms)),
                    *(f"{r.waited_ms:.1f}", f"{r.imbalance_ms:.1f}", f"{r.caused_ms:.1f}"),
                )
                for r in found.requests
            ],
        ),
        "<h2>Clocks of the nodes</h2>",
        table(
            ["node", "against", "ahead, ms", "spread, ms", "told"],
            [
                (s.node, s.reference, f"{s.skew_ms:.2f}", f"{s.spread_ms:.2f}", "yes" if s.told else "")
                for s in steps.skews
            ],
        ),
        "<h2>Do the sources agree?</h2>",
        checks_table(found.checks),
    ]
    return page(f"wide-ep, run {found.run_id}", parts)


def _phases(steps: StepsAnswer) -> alt.Chart:
    names = [*steps.parts, "waited"]
    rows = [
        {"rank": share.rank, "node": share.node, "part": part, "ms": round(ms, 3)}
        for share in steps.by_rank
        for part, ms in zip(names, [*steps.shown(share.ms), share.waited_ms], strict=True)
    ]
    return _map(rows, "rank", "part", "ms", names, len(steps.by_rank), "Mean ms per step, by rank and phase")


def _experts(steps: StepsAnswer) -> alt.Chart:
    rows = [
        {"rank": rank, "expert": expert, "tokens": tokens}
        for rank, row in enumerate(steps.sent)
        for expert, tokens in enumerate(row)
    ]
    experts = [*range(max(map(len, steps.sent)))]
    return _map(rows, "rank", "expert", "tokens", experts, len(steps.sent), "Tokens that each rank sent to each expert")


def _map(
    rows: Sequence[Mapping[str, object]],
    y: str,
    x: str,
    value: str,
    order: list[str] | list[int],
    height: int,
    title: str,
) -> alt.Chart:
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=list(rows)))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", sort=order),
            y=alt.Y(f"{y}:O"),
            color=alt.Color(f"{value}:Q", scale=alt.Scale(scheme="viridis")),
            tooltip=[alt.Tooltip(f"{name}:{'Q' if name == value else 'N'}") for name in rows[0]],
        )
        .properties(
            width=min(WIDTH, 4 * CELL * len(order)), height=min(HEIGHT, max(2 * CELL * height, 80)), title=title
        )
    )
    return chart


def _shares(kind: str, shares: list[Share], steps: StepsAnswer) -> str:
    return table(
        [kind, "node", "pod", "steps", "tokens", "step", *steps.parts, "waited", "dummy steps", "padded tokens"],
        [
            (
                *(share.node if share.rank is None else str(share.rank), share.node, share.pod, str(share.steps)),
                *(f"{share.tokens}", f"{share.step_ms:.2f}", *(f"{ms:.2f}" for ms in steps.shown(share.ms))),
                *(f"{share.waited_ms:.2f}", str(share.dummy), str(share.padded)),
            )
            for share in shares
        ],
    )
