"""``llmtrace up | down | status | doctor``: the local stack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmtrace.deploy import doctor as checks
from llmtrace.deploy import health, playbook
from llmtrace.errors import UserError
from llmtrace.stack import Stack, cache_home, default_path, state_home

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _exit_as(code: int) -> None:
    if code:
        raise typer.Exit(1)


def up(context: typer.Context) -> None:
    """Stand the local stack up, or bring it up to date; a second run changes nothing.

    Further arguments go to ansible-playbook, for example `-e scenario=pd-disaggregation` or `--check --diff`.
    """
    stand_up(context.args)


def stand_up(arguments: Sequence[str] = ()) -> None:
    """Run the playbook; exit code 1 where it fails."""
    _exit_as(playbook.run("site.yml", arguments))


def down(
    context: typer.Context,
    purge: Annotated[bool, typer.Option("--purge", help="Remove traces, metrics and logs as well.")] = False,
) -> None:
    """Stop the local stack. Further arguments go to ansible-playbook."""
    _exit_as(playbook.run("teardown.yml", [*(["-e", "purge=true"] if purge else []), *context.args]))


def status(as_json: Json = False) -> None:
    """Show what runs and answers; exit code 1 where something does not."""
    stack = Stack.load()
    if stack.profile == "cluster":
        raise UserError(
            f"{default_path()} is of a stack in a cluster, which knows itself what runs: see "
            "`kubectl get pods --all-namespaces`"
        )
    states = health.statuses(stack)
    if as_json:
        typer.echo(json.dumps([_state(state) for state in states], indent=2))
    else:
        Console().print(_table(states))
    _exit_as(0 if all(state.ok for state in states) else 1)


def _state(state: health.Status) -> dict[str, Any]:
    process = state.process
    return {
        "name": state.component.name,
        "process": process.state if process else "MISSING",
        "pid": process.pid if process else 0,
        "uptime_s": process.uptime_s if process else 0,
        "ready": state.ready,
        "address": state.component.address,
        "log": str(process.log) if process else None,
    }


def _table(states: list[health.Status]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("component", "process", "ready", "up", "address"):
        table.add_column(column)
    for state in states:
        row = _state(state)
        minutes, seconds = divmod(row["uptime_s"], 60)
        colour = "" if state.ok else "red"
        table.add_row(
            row["name"],
            row["process"],
            "yes" if row["ready"] else "no",
            f"{minutes}m {seconds:02d}s" if row["pid"] else "-",
            row["address"],
            style=colour,
        )
    return table


def doctor(as_json: Json = False) -> None:
    """Check that the local stack can run here; exit code 2 where a check fails."""
    state = state_home()
    try:
        requirements = checks.requirements_of(playbook.default_variables(), cache_home(), state, state / "run")
    except KeyError as error:
        raise UserError(f"The default inventory lacks the variable {error}: restore it from the repository") from None
    outcome = checks.check(checks.gather(requirements), requirements)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in outcome], indent=2))
    else:
        for check in outcome:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name:9} {check.message}")
    if not all(check.ok for check in outcome):
        raise typer.Exit(2)


def mount(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(context_settings=PASS_THROUGH)(up)
    app.command(context_settings=PASS_THROUGH)(down)
    app.command()(status)
    app.command()(doctor)
