"""The wide-ep answer as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from llmtrace.scenarios.text import check_text
from llmtrace.scenarios.wide_ep.answer import StepsAnswer, WideEpAnswer
from llmtrace.scenarios.wide_ep.breakdown import Share
from llmtrace.scenarios.wide_ep.experts import ExpertLoad
from llmtrace.scenarios.wide_ep.requests import RequestSteps
from llmtrace.scenarios.wide_ep.waiting import Straggler

MOST_RANKS, MOST_REQUESTS, MOST_LAYERS = 16, 8, 3
"""Rows that the terminal shows; --json and --html have them all."""


def answer_text(found: WideEpAnswer) -> Iterator[RenderableType]:
    """The answer, part by part."""
    steps = found.steps
    yield Text.assemble(("wide-ep", "bold"), f"  run {found.run_id}  model {found.model}")
    yield Text(f"{steps.steps} steps of {steps.ranks} ranks; {steps.partial} more lack a rank or a phase", style="dim")
    if steps.unknown:
        yield Text(f"{steps.unknown} of them do not say their phases, as in CUDA graphs", style="dim")
    if steps.on_demand:
        yield Text(f"{steps.on_demand} more were traced for slow requests, and count for requests only", style="dim")
    yield Text()
    yield Text("Where do the steps spend their time?  (mean ms per step)", style="bold")
    yield _shares("rank", [str(share.rank) for share in steps.by_rank], steps.by_rank[:MOST_RANKS], steps)
    if len(steps.by_rank) > MOST_RANKS:
        yield Text(f"... and {len(steps.by_rank) - MOST_RANKS} more ranks (--json or --html)", style="dim")
    if len(steps.by_node) > 1:
        yield _shares("node", [share.node for share in steps.by_node], steps.by_node, steps)
    for layer in steps.layers[:MOST_LAYERS]:
        yield Text(
            f"MoE layer {layer.layer} was the slowest of a rank's step {layer.times} times, {layer.ms:.2f} ms each"
        )
    yield Text()
    yield Text("Who waits for whom?", style="bold")
    yield Text(found.verdict)
    yield _stragglers(steps.stragglers)
    yield Text()
    yield Text("How even is the load of the experts?", style="bold")
    yield from _experts(steps.experts)
    yield Text()
    paid = "Which requests paid for it?  (ms, summed over their traced steps; caused: by tokens, not by experts)"
    yield Text(paid, style="bold")
    yield _requests(found.requests[:MOST_REQUESTS], steps)
    yield Text()
    yield Text("Do the sources agree?", style="bold")
    for check in found.checks:
        yield check_text(check)
    for skew in steps.skews:
        if skew.told:
            yield Text(
                f"note: the clock of {skew.node} is {skew.skew_ms:+.1f} ms off that of {skew.reference}; "
                "no number above compares clocks of two nodes",
                style="yellow",
            )


def _numbers(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shares(kind: str, names: Sequence[str], shares: Sequence[Share], steps: StepsAnswer) -> Table:
    pods = any(share.pod for share in shares)
    table = _numbers(kind, "node", *(["pod"] if pods else []), "step", *steps.parts, "waited", "dummy", "padded tokens")
    for name, share in zip(names, shares, strict=False):
        table.add_row(
            name,
            share.node,
            *([share.pod] if pods else []),
            f"{share.step_ms:.2f}",
            *(f"{ms:.2f}" for ms in steps.shown(share.ms)),
            f"{share.waited_ms:.2f}",
            f"{share.dummy / share.steps:.0%}",
            f"{share.padded:,}",
        )
    return table


def _stragglers(found: Sequence[Straggler]) -> Table:
    table = _numbers("rank", "node", "last in", "the others waited", "in all", "slower in")
    for each in found[:MOST_RANKS]:
        table.add_row(
            str(each.rank),
            each.node,
            f"{each.share:.0%}",
            f"{each.delay_ms:.2f} ms",
            f"{each.total_ms:.0f} ms",
            each.phase,
        )
    return table


def _experts(load: ExpertLoad | None) -> Iterator[RenderableType]:
    if load is None:
        yield Text("no step says what its experts got", style="dim")
        return
    top = ", ".join(f"{expert} ({share:.1%})" for expert, share in zip(load.top, load.shares, strict=True))
    yield Text(
        f"{load.experts} experts, {load.tokens:,} tokens: the fullest has {load.max_over_mean:.2f} times the mean, "
        f"entropy {load.entropy:.3f} (1 is even)"
    )
    yield Text(f"most tokens: {top}")


def _requests(found: Sequence[RequestSteps], steps: StepsAnswer) -> Table:
    table = _numbers(
        "trace", "tenant", "rank", "steps", "on demand", "in steps", *steps.parts, "waited", "imbalance", "caused"
    )
    for each in found:
        table.add_row(
            each.trace_id,
            each.tenant,
            str(each.rank),
            str(each.prefill_steps + each.decode_steps),
            str(each.on_demand),
            f"{each.step_ms:.1f}",
            *(f"{ms:.1f}" for ms in steps.shown(each.ms)),
            f"{each.waited_ms:.1f}",
            f"{each.imbalance_ms:.1f}",
            f"{each.caused_ms:.1f}",
        )
    return table
