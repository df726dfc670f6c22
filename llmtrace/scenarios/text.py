"""What the answers have in common as text for the terminal, and the smoke test's outcome."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from llmtrace.scenarios.checks import Check
from llmtrace.scenarios.smoke import Verification

AGREES = {True: ("yes", "green"), False: ("no", "bold red"), None: ("-", "dim")}


def check_text(check: Check) -> Text:
    """A check and its disagreements."""
    word, style = AGREES[check.ok]
    text = Text.assemble((f"{word:<4}", style), f"{check.name}: {check.detail}")
    for line in check.disagreements:
        text.append(f"\n    {line}")
    return text


def verification_text(result: Verification) -> Iterator[RenderableType]:
    """The smoke test's outcome, trace by trace."""
    for trace in result.traces:
        good = not trace.problems
        yield Text.assemble(
            ("ok  " if good else "BAD ", "green" if good else "bold red"),
            f"{trace.trace_id}  {trace.arm}  {trace.spans} spans",
        )
        for problem in trace.problems:
            yield Text(f"    {problem.component}: {problem.message}" + (f" ({problem.hint})" if problem.hint else ""))
    for failure in result.failed_requests:
        yield Text(f"    a request failed: {failure}", style="red")
    if (more := result.wrong - sum(bool(t.problems) for t in result.traces)) > 0:
        yield Text(f"... and {more:,} more that are wrong and not listed, with --json neither", style="dim")
    blamed = sorted({p.component for t in result.traces for p in t.problems})
    tolerance = f"clock tolerance {result.clock_tolerance_ms:g} ms"
    if result.ok:
        yield Text(f"{result.checked:,} traces, each one complete tree ({tolerance})", style="bold green")
    else:
        yield Text(
            f"{result.wrong:,} of {result.checked:,} traces are wrong; look at: "
            f"{', '.join(blamed) or 'the gateways'} ({tolerance})",
            style="bold red",
        )
