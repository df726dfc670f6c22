"""The autoscaling answer as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.scenarios.autoscaling.answer import AutoscalingAnswer
from llmtrace.scenarios.autoscaling.effects import DecisionAnswer
from llmtrace.scenarios.text import check_text
from llmtrace.semconv import attributes as a

HELD = {
    a.LIMITED_UP: "scale-up policy",
    a.LIMITED_DOWN: "scale-down policy",
    a.UP_STABILIZED: "scale-up window",
    a.DOWN_STABILIZED: "scale-down window",
}
"""What keeps a number of replicas from changing, in words."""
MOST_DECISIONS = 20
"""Decisions that the terminal shows; --json and --html have them all."""


def answer_text(found: AutoscalingAnswer) -> Iterator[RenderableType]:
    """The answer, part by part."""
    yield Text.assemble(("autoscaling", "bold"), f"  run {found.run_id}  model {found.model}")
    yield Text()
    yield Text("What was decided, on which requests, and did it help?", style="bold")
    shown = found.decisions[:MOST_DECISIONS]
    yield _decisions(found, shown)
    if len(found.decisions) > len(shown):
        yield Text(f"... and {len(found.decisions) - len(shown)} more (--json or --html)", style="dim")
    yield Text(found.verdict, style="bold")
    yield Text()
    yield Text("How long until new replicas were useful, in seconds?", style="bold")
    yield _replicas(found, shown)
    for decision in shown:
        for failure in decision.failures:
            yield Text(f"never ready: {failure}", style="red")
    cost = f", {found.cost:,.2f} at the configured price" if found.cost else ""
    yield Text(f"added replicas: {found.accelerator_s:,.0f} accelerator-seconds{cost}")
    yield Text()
    yield Text("Which requests drove the decisions?", style="bold")
    yield _kinds(found)
    yield Text(attribution_sentence(found))
    yield Text()
    yield Text("Do the sources agree?", style="bold")
    for check in found.checks:
        yield check_text(check)
    for note in found.notes:
        yield Text(f"note: {note}", style="yellow")


def attribution_sentence(found: AutoscalingAnswer) -> str:
    """Precision and recall, where the workload tells kinds."""
    told = found.attribution
    if told.precision is None or told.recall is None:
        return f"{told.attributed} requests drove decisions; the workload does not tell which should have"
    return (
        f"{told.attributed} requests drove decisions, {told.of_driving_kind} of the kind that the scaler counts: "
        f"precision {told.precision:.0%}, recall {told.recall:.0%}"
    )


def metric_text(decision: DecisionAnswer) -> str:
    """The metric that counted, its value, and its target for a replica."""
    return "-" if decision.value is None else f"{decision.metric} {decision.value:g}/{decision.target:g}"


def drivers_text(decision: DecisionAnswer) -> str:
    """How many requests drove the decision; one that adds nothing, nor would, was driven by none."""
    if not decision.driven or decision.value is None:
        return "-"
    if not decision.attributable:
        return "not attributable"
    tokens = "" if decision.driver_tokens is None else f" ({decision.driver_tokens:,} tokens)"
    return f"{decision.drivers}{tokens}"


def queue_text(decision: DecisionAnswer) -> str:
    """Waiting requests on average before and after the decision took effect."""
    if decision.queue_before is None or decision.queue_after is None:
        return "-"
    return f"{decision.queue_before:.1f} > {decision.queue_after:.1f}"


def verdict_text(decision: DecisionAnswer) -> str:
    """The verdict, and what limits there were."""
    more = ""
    if decision.verdict == "limited":
        more = f" to {decision.maximum} for {decision.limited_s:.0f} s"
    elif decision.verdict == "held":
        by = next((HELD[by] for by in (decision.limit, decision.stabilization) if by in HELD), "")
        return f"held: {by or 'no metric'}" if by or decision.value is None else "no longer held"
    elif decision.limit == a.LIMITED_MAX:
        more = f", limited to {decision.maximum}"
    elif told := drained_text(decision):
        more = f" ({told})"
    return f"{decision.verdict}{more}{', flapping' if decision.flapping else ''}"


def drained_text(decision: DecisionAnswer) -> str:
    """What became of the requests on the replicas that it stopped, as far as there were any and somebody counted."""
    counts = (
        ("running", [d.running for d in decision.drained]),
        ("cut", [d.cut for d in decision.drained]),
        ("moved", [d.moved for d in decision.drained]),
    )
    known = [(word, sum(n or 0 for n in numbers)) for word, numbers in counts if any(n is not None for n in numbers)]
    return ", ".join(f"{number} {word}" for word, number in known) if any(number for _, number in known) else ""


def at_s(found: AutoscalingAnswer, decision: DecisionAnswer) -> float:
    """When the decision was taken, in seconds from the start."""
    return (decision.time_ns - found.start_ns) / 1e9


def _decisions(found: AutoscalingAnswer, decisions: list[DecisionAnswer]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("at, s", "replicas"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("metric, value/target", no_wrap=True)
    for name in ("drivers", "wait, user-s", "token-s", "queue"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("verdict", "trace"):
        table.add_column(name, overflow="fold", no_wrap=name == "trace")
    for d in decisions:
        table.add_row(
            f"{at_s(found, d):.0f}",
            f"{d.current} > {d.desired}",
            metric_text(d),
            drivers_text(d),
            f"{d.wait_user_s:,.0f}",
            f"{d.wait_token_s:,.0f}",
            queue_text(d),
            verdict_text(d),
            d.trace_id,
        )
    return table


def _replicas(found: AutoscalingAnswer, decisions: list[DecisionAnswer]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("at, s", justify="right")
    table.add_column("replica")
    for name in ("began to wait", "start", "model", "ready", "first request", "useful after", "accelerator-s"):
        table.add_column(name, justify="right")
    table.add_column("outcome")
    for d in decisions:
        for r in d.replicas:
            phases = [r.phases.get(p) for p in (a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN, a.READY_SPAN)]
            seconds = [*phases, r.phases.get(a.FIRST_REQUEST_SPAN), r.useful_s]
            table.add_row(
                f"{at_s(found, d):.0f}",
                r.name,
                f"{d.detection_s:.1f} before",
                *("-" if s is None else f"{s:.1f}" for s in seconds),
                f"{r.accelerator_s:,.0f}" + ("+" if r.still_running else ""),
                r.outcome,
            )
    return table


def _kinds(found: AutoscalingAnswer) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    for name in ("requests", "drove a decision", "waited, user-s", "longest wait, s"):
        table.add_column(name, justify="right")
    for k in found.kinds:
        table.add_row(k.kind, f"{k.requests:,}", f"{k.drivers:,}", f"{k.wait_user_s:,.0f}", f"{k.longest_wait_s:.1f}")
    return table
