"""Measures answer and verify of the autoscaling scenario on a synthetic day of decisions and requests.

``python -m bench.autoscaling [--requests N] [--decisions N] [--json]``. The traces are the tests' synthetic ones, of
eleven spans each; making them does not count. Exit code 1 where one of the two takes more than ``SECONDS``, the process
more than ``MEBIBYTES``, or something is found to be wrong.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from example_scaling import Day

from llmtrace.scenarios.catalogue import scenario
from llmtrace.scenarios.smoke import check
from llmtrace.traces.model import Trace

SECONDS, MEBIBYTES = 10.0, 2048
AT_ONCE = 100
"""Traces that are made before they are handed on: few, as one that is read is checked while caches still have it."""


class Source:
    """The traces of a day, and the processor seconds that it took to make them."""

    def __init__(self, requests: int, decisions: int) -> None:
        self.seconds = 0.0
        self._day = Day(requests, decisions)

    def traces(self) -> Iterator[Trace]:
        made = self._day.traces()
        while True:
            start = time.process_time()
            some = list(islice(made, AT_ONCE))
            self.seconds += time.process_time() - start
            if not some:
                return
            yield from some


def measure(requests: int, decisions: int) -> dict[str, float]:
    """Processor seconds of answer and verify, and the most memory of the process in MiB."""
    autoscaling = scenario("autoscaling")
    source = Source(requests, decisions)
    start = time.process_time()
    found = autoscaling.answer("day", source.traces())
    answered = time.process_time() - start - source.seconds
    differ = [c.name for c in found.checks if c.ok is False]
    told, number = found.attribution, len(found.decisions)
    del found
    source = Source(requests, decisions)
    start = time.process_time()
    verified = check(source.traces(), autoscaling)
    return {
        "requests": requests,
        "decisions": number,
        "precision": told.precision or 0.0,
        "recall": told.recall or 0.0,
        "checks that differ": len(differ),
        "traces verified": verified.checked,
        "of them wrong": verified.wrong,
        "answer, s": round(answered, 1),
        "verify, s": round(time.process_time() - start - source.seconds, 1),
        "memory, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def within_limits(result: dict[str, float]) -> bool:
    """Whether nothing took too long or too much, and everything was found as it is."""
    quick = max(result["answer, s"], result["verify, s"]) <= SECONDS and result["memory, MiB"] <= MEBIBYTES
    whole = result["traces verified"] == result["requests"] + result["decisions"]
    return quick and whole and not result["of them wrong"] and not result["checks that differ"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--decisions", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.requests, options.decisions)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"autoscaling: {name:22} {value:,}")
    return 0 if within_limits(result) else 1


if __name__ == "__main__":
    sys.exit(main())
