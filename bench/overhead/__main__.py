"""``python -m bench.overhead``: what tracing costs an inference server, measured on real vLLM servers.

Starts its own servers, side by side: without tracing, with vLLM's own, with llmtrace; and sends them the same requests
in turn. Needs what ``make up`` installs (vLLM and the model), and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.overhead import report
from bench.overhead.plans import PYTHON, SMOL, TINY
from bench.overhead.rounds import measure
from bench.overhead.servers import install_plugin
from llmtrace.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: the tiny model, two short rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="also write the tables into this Markdown page")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except UserError as error:
        print(f"bench.overhead: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    for path in (PYTHON, SMOL.path):
        if path is not None and not path.exists():
            raise UserError(f"{path} is not there: run `make up` once")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = install_plugin(folder / "plugin")
        plans = [replace(TINY, starts=1, rounds=2)] if arguments.quick else [TINY, SMOL]
        for plan in plans:
            measured = measure(plan, plugin, folder, say)
            print(report.verdict(measured))
            print(report.comparison(measured))
            if plan.path is None:
                print(report.ladder(measured))
                print(report.pressure(measured))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
