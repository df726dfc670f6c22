"""Measures the answer of the autoscaling scenario on a synthetic day of decisions and requests.

``python -m bench.autoscaling [--requests N] [--decisions N] [--json]``. The traces are the tests' synthetic ones; the
time to make them is measured by itself and taken off.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from example_scaling import Day

from llmtrace.scenarios.catalogue import scenario


def measure(requests: int, decisions: int) -> dict[str, float]:
    """Processor seconds of the answer, and the most memory of the process in MiB."""
    start = time.process_time()
    for _ in Day(requests, decisions).traces():
        pass
    made = time.process_time() - start
    start = time.process_time()
    found = scenario("autoscaling").answer("day", Day(requests, decisions).traces())
    both = time.process_time() - start
    return {
        "requests": requests,
        "decisions": len(found.decisions),
        "precision": found.attribution.precision or 0.0,
        "recall": found.attribution.recall or 0.0,
        "making the traces, s": round(made, 1),
        "answer, s": round(both - made, 1),
        "memory, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--decisions", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.requests, options.decisions)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"autoscaling: {name:22} {value:,}")


if __name__ == "__main__":
    main()
