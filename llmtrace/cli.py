"""The ``llmtrace`` command."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmtrace import cli_conformance, cli_scenarios, cli_stack
from llmtrace.errors import UserError
from llmtrace.scenarios.prefix_cache import NAME
from llmtrace.stack import Stack

app = typer.Typer(
    help="Distributed tracing of LLM inference on llm-d: a traced stack, and answers from its traces.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
cli_stack.mount(app)
cli_scenarios.mount(app)
cli_conformance.mount(app)


@app.command()
def demo(
    report: Annotated[Path, typer.Option(help="Write the HTML report here.")] = Path("reports/prefix-cache.html"),
) -> None:
    """Stand up the local stack, run the scenarios on real inference, verify their traces, print their answers."""
    console, start = Console(stderr=True), time.monotonic()

    def step(title: str) -> None:
        console.rule(f"{title}  [dim]{time.monotonic() - start:.0f} s[/dim]", align="left")

    step("1. Stand up the traced stack")
    cli_stack.stand_up()
    step("2. Run the prefix-cache scenario on it")
    cli_scenarios.run(NAME)
    step("3. Verify that each request gives one complete trace")
    cli_scenarios.verify(NAME)
    step("4. Answer from the traces")
    cli_scenarios.answer(NAME, html=report)
    stack = Stack.load()
    step("Where to look")
    console.print(f"report with plots    {report.resolve()}")
    console.print("one request          llmtrace trace TRACE_ID")
    console.print("what runs where      llmtrace status")
    console.print(f"metrics              {stack.prometheus}")
    console.print(f"traces (Tempo API)   {stack.store}")
    console.print("stop                 make down")


def main() -> None:
    """Run the command line; a UserError becomes one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"llmtrace: {error}", file=sys.stderr)
        sys.exit(2)
