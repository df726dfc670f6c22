"""Writes what follows from the registry: the constants of the code, and the reference for people.

``python -m llmtrace.semconv.generate`` writes both; with ``--check`` it only says whether they are up to date
(exit code 1 if not).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import wrap

from llmtrace.errors import UserError
from llmtrace.semconv.definitions import Registry, registry
from llmtrace.semconv.reference import reference

PACKAGE = Path(__file__).resolve().parents[1]
ATTRIBUTES = PACKAGE / "semconv" / "attributes.py"
REFERENCE = PACKAGE.parent / "docs" / "reference.md"
COMMAND = "python -m llmtrace.semconv.generate"
WIDTH = 116


def constants(declared: Registry) -> str:
    """The module :mod:`llmtrace.semconv.attributes`."""
    lines = [
        '"""Names of spans, attributes and headers that the code writes and reads.',
        "",
        f"Generated from llmtrace/semconv/registry by ``{COMMAND}``; change it there.",
        '"""',
        "",
        "from __future__ import annotations",
    ]
    for file, group in groupby(declared.constants, key=lambda c: c.file):
        lines += ["", f"# {file}"]
        for constant in group:
            lines.append(f'{constant.name} = "{constant.value}"')
            first, *rest = wrap(f"{constant.brief}.", WIDTH)
            lines += [f'"""{first}', *rest]
            lines[-1] += '"""'
    return "\n".join(lines) + "\n"


def files(declared: Registry) -> dict[Path, str]:
    """The generated files and what must be in them."""
    return {ATTRIBUTES: constants(declared), REFERENCE: reference(declared)}


def stale(wanted: dict[Path, str]) -> list[Path]:
    """The files that are not what they must be."""
    return [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the files that follow from the registry.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    options = parser.parse_args(arguments)
    try:
        wanted = files(registry())
    except UserError as error:
        print(f"llmtrace: {error}", file=sys.stderr)
        return 2
    changed = stale(wanted)
    for path in changed:
        name = path.relative_to(PACKAGE.parent)
        if options.check:
            print(f"{name} does not follow from the registry; run `make generate`", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {name}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
