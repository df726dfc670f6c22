"""The autoscaling answer as one HTML file that needs nothing from the network."""

from __future__ import annotations

from importlib.metadata import version

import altair as alt

from llmtrace.scenarios.autoscaling.answer import AutoscalingAnswer
from llmtrace.scenarios.autoscaling.text import (
    at_s,
    attribution_sentence,
    drivers_text,
    metric_text,
    queue_text,
    verdict_text,
)
from llmtrace.scenarios.page import checks_table, escaped, page, plots, table
from llmtrace.semconv import attributes as a

WIDTH = 980
COLOURS = {"waiting": "#c8553d", "running": "#8fb8b5"}
REPLICAS = {"asked for": "#1d2327", "ready": "#1b7f79"}
MOST_ROWS = 1000


def autoscaling_html(found: AutoscalingAnswer) -> str:
    """The whole report: verdict, timeline, every decision with its trace ids, phases, costs, checks."""
    parts = [
        f"<p>Model {escaped(found.model)}, llmtrace {escaped(version('llmtrace'))}. All numbers are from traces.</p>",
        f'<p class="verdict">{escaped(found.verdict)}</p>',
        plots(_timeline(found)),
        "<h2>Decisions</h2>",
        *([_cut(found)] if len(found.decisions) > MOST_ROWS else []),
        _decisions(found),
        "<h2>Time until new replicas were useful, in seconds</h2>",
        _replicas(found),
        "<h2>What else would have saved</h2>",
        _savings(found),
        "<h2>Which requests drove the decisions?</h2>",
        _kinds(found),
        f"<p>{escaped(attribution_sentence(found))}.</p>",
        _drivers(found),
        "<h2>Do the sources agree?</h2>",
        checks_table(found.checks),
        *(f"<p>Note: {escaped(note)}.</p>" for note in found.notes),
    ]
    return page(f"autoscaling, run {found.run_id}", parts)


def _cut(found: AutoscalingAnswer) -> str:
    return f"<p>Here and below: the first {MOST_ROWS:,} of {len(found.decisions):,} decisions; --json has them all.</p>"


def _timeline(found: AutoscalingAnswer) -> alt.VConcatChart:
    """Requests above, replicas below, a line for each decision through both."""
    requests = [
        {"s": m.at_s, "requests": n, "what": what}
        for m in found.timeline
        for what, n in (("running", m.running), ("waiting", m.waiting))
    ]
    replicas = [
        {"s": m.at_s, "replicas": n, "what": what}
        for m in found.timeline
        for what, n in (("asked for", m.desired), ("ready", m.ready))
    ]
    x = alt.X("s:Q", title="seconds")
    above = (
        alt.Chart(alt.InlineData(values=requests))
        .mark_area(interpolate="step-after", opacity=0.8)
        .encode(x=x, y=alt.Y("requests:Q", stack=True), color=_colour(COLOURS), tooltip=["s:Q", "what:N", "requests:Q"])
    )
    below = (
        alt.Chart(alt.InlineData(values=replicas))
        .mark_line(interpolate="step-after")
        .encode(
            x=x,
            y=alt.Y("replicas:Q", axis=alt.Axis(tickMinStep=1)),
            color=_colour(REPLICAS),
            strokeDash=alt.StrokeDash("what:N", legend=None),
            tooltip=["s:Q", "what:N", "replicas:Q"],
        )
    )
    rules = _rules(found)
    chart: alt.VConcatChart = alt.vconcat(
        alt.layer(above, rules).properties(width=WIDTH, height=240, title="Requests at the gateway"),
        alt.layer(below, rules).properties(width=WIDTH, height=160, title="Replicas (lines: decisions)"),
    ).resolve_scale(color="independent")
    return chart


def _colour(colours: dict[str, str]) -> alt.Color:
    return alt.Color("what:N", title=None, scale=alt.Scale(domain=list(colours), range=list(colours.values())))


def _rules(found: AutoscalingAnswer) -> alt.Chart:
    rows = [
        {"s": at_s(found, d), "decision": f"{d.current} > {d.desired}: {d.reason}", "verdict": d.verdict}
        for d in found.decisions[:MOST_ROWS]
    ]
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rule(strokeDash=[3, 3], color="#666")
        .encode(x="s:Q", tooltip=["s:Q", "decision:N", "verdict:N"])
    )
    return chart


def _decisions(found: AutoscalingAnswer) -> str:
    return table(
        [
            *(
                "at, s",
                "direction",
                "replicas",
                "metric, value/target",
                "reason",
                "limit",
                "stabilisation",
                "drivers",
            ),
            *(
                "waiting",
                "user-seconds",
                "token-seconds",
                "queue before > after",
                "accelerator-s",
                "cost",
                "verdict",
                "trace",
            ),
        ],
        [
            (
                f"{at_s(found, d):.1f}",
                d.direction,
                f"{d.current} > {d.desired}",
                metric_text(d),
                d.reason,
                d.limit,
                d.stabilization,
                drivers_text(d),
                f"{d.queue_then}",
                f"{d.wait_user_s:,.1f}",
                f"{d.wait_token_s:,.0f}",
                queue_text(d),
                f"{d.accelerator_s:,.0f}",
                f"{d.cost:,.4f}",
                verdict_text(d),
                d.trace_id,
            )
            for d in found.decisions[:MOST_ROWS]
        ],
    )


def _replicas(found: AutoscalingAnswer) -> str:
    names = (a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN, a.READY_SPAN, a.FIRST_REQUEST_SPAN)
    return table(
        ["at, s", "replica", *names, "useful after", "outcome", "why it failed"],
        [
            (
                f"{at_s(found, d):.1f}",
                r.name,
                *(f"{r.phases[n]:.1f}" if n in r.phases else "-" for n in names),
                "-" if r.useful_s is None else f"{r.useful_s:.1f}",
                r.outcome,
                r.failure,
            )
            for d in found.decisions[:MOST_ROWS]
            for r in d.replicas
        ],
    )


def _savings(found: AutoscalingAnswer) -> str:
    return table(
        ["at, s", "requests began to wait before", "warm replicas, at most, user-s", "a prediction, at most, user-s"],
        [
            (f"{at_s(found, d):.1f}", f"{d.detection_s:.1f} s", f"{d.warm_pool_s:,.1f}", f"{d.prediction_s:,.1f}")
            for d in found.decisions[:MOST_ROWS]
            if d.replicas
        ],
    )


def _kinds(found: AutoscalingAnswer) -> str:
    return table(
        ["kind", "requests", "drove a decision", "waited, user-seconds", "longest wait, s"],
        [
            (k.kind, f"{k.requests:,}", f"{k.drivers:,}", f"{k.wait_user_s:,.1f}", f"{k.longest_wait_s:.1f}")
            for k in found.kinds
        ],
    )


def _drivers(found: AutoscalingAnswer) -> str:
    return table(
        ["decision", "drivers", "those that were most of the metric"],
        [
            (d.id, drivers_text(d), ", ".join(d.examples))
            for d in found.decisions[:MOST_ROWS]
            if d.driven and (d.drivers or not d.attributable)
        ],
    )
