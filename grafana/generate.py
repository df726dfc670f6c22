"""Writes the dashboards' JSON: ``python -m grafana.generate``; with ``--check`` it says whether it is up to date.

Exit code 1 if it is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grafana.dashboards import boards
from grafana.render import to_json

FOLDER = Path(__file__).with_name("generated")
COMMAND = "python -m grafana.generate"


def files() -> dict[Path, str]:
    """The generated files and what must be in them."""
    return {FOLDER / f"{board.uid.removeprefix('llmtrace-')}.json": to_json(board) for board in boards()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the JSON of the dashboards.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check: bool = parser.parse_args(arguments).check
    wanted = files()
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    left = sorted(set(FOLDER.glob("*.json")) - wanted.keys())
    for path in (*changed, *left):
        name = path.relative_to(FOLDER.parents[1])
        if check:
            print(f"{name} does not follow from grafana/dashboards; run `make generate`", file=sys.stderr)
        elif path in wanted:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {name}")
        else:
            path.unlink()
            print(f"removed {name}")
    return 1 if check and (changed or left) else 0


if __name__ == "__main__":
    sys.exit(main())
