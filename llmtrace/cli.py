"""The ``llmtrace`` command."""

from __future__ import annotations

import sys

import typer

from llmtrace.errors import UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command line; a UserError becomes one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"llmtrace: {error}", file=sys.stderr)
        sys.exit(2)
