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
from llmtrace.scenarios import catalogue
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
    names: Annotated[
        list[str] | None, typer.Argument(metavar="SCENARIO", help="The scenarios to show; default: all of them.")
    ] = None,
    reports: Annotated[Path, typer.Option(help="Write the HTML reports into this folder.")] = Path("reports"),
) -> None:
    """Stand up the local stack, run the scenarios on real inference, verify their traces, print their answers."""
    console, start = Console(stderr=True), time.monotonic()

    def step(title: str) -> None:
        console.rule(f"{title}  [dim]{time.monotonic() - start:.0f} s[/dim]", align="left")

    for scenario in [catalogue.scenario(name) for name in names or catalogue.SCENARIOS]:
        step(f"{scenario.name}: stand up its stack")
        cli_stack.stand_up(["-e", f"scenario={scenario.name}"])
        step(f"{scenario.name}: run its workload")
        cli_scenarios.run(scenario.name)
        step(f"{scenario.name}: verify that each request gives one complete trace")
        cli_scenarios.verify(scenario.name)
        step(f"{scenario.name}: answer from the traces")
        cli_scenarios.answer(scenario.name, html=reports / f"{scenario.name}.html")
    stack = Stack.load()
    step("Where to look")
    console.print(f"reports with plots   {reports.resolve()}")
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
