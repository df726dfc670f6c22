"""Measures how long answers take to compute from traces that are already read.

``python -m bench.answers [--traces N] [--json]``. The traces are the tests' synthetic ones, spread over the arms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from example_pd_traces import ARMS, TENANTS, pd_run

from llmtrace.scenarios.catalogue import scenario

BLOCKS = 50


def measure(traces: int) -> dict[str, float]:
    """Seconds for the answer of pd-disaggregation about so many traces, its text and its report."""
    each = max(traces // (BLOCKS * len(ARMS) * len(TENANTS)), 1)
    pd = scenario("pd-disaggregation")
    run = pd_run(lambda uncached, split: 200 + uncached / (3 if split else 2), blocks=BLOCKS, each=each)
    start = time.perf_counter()
    found = pd.answer("run-1", run)
    answered = time.perf_counter()
    for _ in pd.text(found):
        pass
    shown = time.perf_counter()
    pd.html(found)
    written = time.perf_counter()
    return {
        "traces": len(run),
        "spans": sum(len(t.spans) for t in run),
        "answer, s": round(answered - start, 2),
        "text, s": round(shown - answered, 2),
        "report, s": round(written - shown, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.traces)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"pd-disaggregation: {name:20} {value:,}")


if __name__ == "__main__":
    main()
