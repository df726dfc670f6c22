"""Measures the analysis of steps: processor seconds and memory for spans of many ranks, read from one trace at a time.

``python -m bench.wide_ep [--ranks N] [--steps N] [--experts N] [--json]``. The steps are the tests' synthetic ones,
each of new spans with random work; making them does not count. One in eight tells its experts' tokens, as the plugin
does if nobody says otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from example_steps import step

from llmtrace.engine.steps.ids import EXPERTS_DEFAULT
from llmtrace.scenarios.wide_ep.answer import analyse
from llmtrace.scenarios.wide_ep.steps import read_steps
from llmtrace.traces.model import Trace

SLOW_RANK, SLOW_MS = 11, 5.0


class Source:
    """The traces of steps, and the processor seconds that it took to make them."""

    def __init__(self, steps: int, ranks: int, experts: int) -> None:
        self.seconds = 0.0
        self._steps, self._ranks, self._experts = steps, ranks, experts

    def traces(self) -> Iterator[Trace]:
        rng = random.Random(1)
        for number in range(self._steps):
            start = time.process_time()
            work = {rank: rng.gammavariate(4.0, 1.5) for rank in range(self._ranks)}
            work[SLOW_RANK % self._ranks] += SLOW_MS
            tells = number % EXPERTS_DEFAULT == 0
            tokens = [rng.randrange(2000) for _ in range(self._experts)] if tells else ()
            made = step(number, self._ranks, experts_ms=work, tokens=tokens)
            self.seconds += time.process_time() - start
            yield made


def measure(steps: int, ranks: int, experts: int) -> dict[str, float]:
    """Processor seconds, and the process's largest memory, for so many steps."""
    source = Source(steps, ranks, experts)
    start = time.process_time()
    columns = read_steps(source.traces())
    read = time.process_time()
    found = analyse(columns)
    analysed = time.process_time()
    assert (found.steps, found.ranks, found.partial) == (steps, ranks, 0)
    assert found.stragglers[0].rank == SLOW_RANK % ranks
    return {
        "spans": steps * ranks,
        "spans to columns, s": round(read - start - source.seconds, 2),
        "columns to answer, s": round(analysed - read, 2),
        "together, s": round(analysed - start - source.seconds, 2),
        "memory, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.steps, options.ranks, options.experts)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"wide-ep: {name:22} {value:,}")


if __name__ == "__main__":
    main()
