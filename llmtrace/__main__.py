"""Start of the ``llmtrace`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the extra that it needs, say so."""
    try:
        from llmtrace import cli
    except ModuleNotFoundError as error:
        print(f"llmtrace: the command needs {error.name}: install llmtrace[kit]", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
