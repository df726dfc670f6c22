"""``python -m bench.overhead``: what tracing costs an inference server, measured on real vLLM servers.

Starts its own servers, side by side: without tracing, with vLLM's own, with llmtrace; and sends them the same requests
in turn. Needs what ``make up`` installs (vLLM and the model), and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.overhead import engine_loop, live, report
from bench.overhead.analysis import analyse
from bench.overhead.plans import PYTHON, QUICK, SMOL, TINY
from bench.overhead.rounds import measure
from bench.overhead.servers import install_plugin, make_tiny_model
from llmtrace.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of about two minutes: tiny model, two rounds")
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
    plans = [QUICK] if arguments.quick else [TINY, SMOL]
    for path in (PYTHON, *(plan.path for plan in plans)):
        if path is not None and not path.exists():
            raise UserError(f"{path} is not there: run `make up` once")
    if arguments.report:
        report.check(arguments.report)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = install_plugin(folder / "plugin")
        tiny = make_tiny_model(folder / "tiny-model")
        results = [analyse(measure(plan, plan.path or tiny, plugin, folder, say)) for plan in plans]
        say("the engine's loop")
        costs = engine_loop.measure(tiny, plugin)
        say("the hooks in a running server")
        running = live.measure(plans[0], tiny, plugin, folder)
    text = report.page(results, costs, running)
    if arguments.report:
        report.write_into(arguments.report, text)
    print(json.dumps(report.data(results, costs, running), indent=2) if arguments.json else text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
