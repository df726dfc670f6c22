"""Measures the answer about steps of many ranks: processor seconds and memory; exit code 1 beyond what it may need.

``python -m bench.wide_ep [--ranks N] [--steps N] [--experts N] [--requests N] [--graphs] [--json]``. The steps are the
tests' synthetic ones, each of new spans with random work, read from one trace at a time as ``llmtrace answer`` does;
making them does not count. One in eight tells its experts' tokens, as the plugin does if nobody says otherwise. With
``--graphs`` they say no phases.
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

from opentelemetry.proto.trace.v1 import trace_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from example_steps import block, request, step

from llmtrace.engine.facts import MAX_STEPS
from llmtrace.engine.steps.ids import EXPERTS_DEFAULT
from llmtrace.scenarios.wide_ep.answer import answer
from llmtrace.scenarios.wide_ep.waiting import START
from llmtrace.traces.model import Trace
from llmtrace.traces.otlp import any_value, decode_trace

MOST_S, MOST_MIB = 10.0, 2048
SLOW_RANK, SLOW_MS = 11, 5.0
DECODED = 20
"""Steps of which the store's bytes are read, to know what a span costs."""


class Source:
    """The traces of a run: its requests, which link to random steps, and the steps.

    ``seconds`` are the processor's that it took to make them, ``ended`` its time when the last one was read.
    """

    def __init__(self, steps: int, ranks: int, experts: int, requests: int, *, graphs: bool) -> None:
        self.seconds = self.ended = 0.0
        self._steps, self._ranks, self._experts, self._requests = steps, ranks, experts, requests
        self._graphs = graphs
        self._rng = random.Random(1)

    def traces(self) -> Iterator[Trace]:
        yield block(self._requests)
        for number in range(self._requests):
            start = time.process_time()
            linked = [Trace(f"{self._rng.randrange(self._steps) + 1:032x}", ()) for _ in range(MAX_STEPS)]
            made = request(number, number % self._ranks, linked[:1], linked[1:])
            self.seconds += time.process_time() - start
            yield made
        for number in range(self._steps):
            start = time.process_time()
            made = self.step(number)
            self.seconds += time.process_time() - start
            yield made
        self.ended = time.process_time()

    def step(self, number: int) -> Trace:
        rng = self._rng
        work = {rank: rng.gammavariate(4.0, 1.5) for rank in range(self._ranks)}
        slow = SLOW_RANK % self._ranks
        work[slow] += SLOW_MS
        tells = number % EXPERTS_DEFAULT == 0
        tokens = [rng.randrange(2000) for _ in range(self._experts)] if tells else ()
        late = {slow: SLOW_MS} if self._graphs else None
        return step(number, self._ranks, experts_ms=work, tokens=tokens, late_ms=late, phased=not self._graphs)


def measure(steps: int, ranks: int, experts: int, requests: int, *, graphs: bool) -> dict[str, float]:
    """Processor seconds, and the process's largest memory, for so many steps."""
    source = Source(steps, ranks, experts, requests, graphs=graphs)
    start = time.process_time()
    found = answer("r", source.traces())
    answered = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert (found.steps.steps, found.steps.ranks, found.steps.partial) == (steps, ranks, 0)
    assert found.steps.unknown == (steps if graphs else 0)
    assert (found.steps.stragglers[0].rank, found.steps.stragglers[0].phase == START) == (SLOW_RANK % ranks, graphs)
    assert len(found.requests) == requests
    assert all(check.ok for check in found.checks), found.checks
    return {
        "spans": steps * ranks,
        "requests": requests,
        "spans to columns, s": round(source.ended - start - source.seconds, 2),
        "columns to answer, s": round(answered - source.ended, 2),
        "together, s": round(answered - start - source.seconds, 2),
        "memory, MiB": round(memory),
        "store's bytes to a span, us": round(decoding_us(source), 1),
    }


def decoding_us(source: Source) -> float:
    """Processor time for a span of what the store answers, microseconds."""
    answers = [encoded(source.step(number)) for number in range(DECODED)]
    start = time.process_time()
    spans = sum(len(found.spans) for data in answers if (found := decode_trace("a" * 32, data)) is not None)
    return (time.process_time() - start) / spans * 1e6


def encoded(trace: Trace) -> bytes:
    """A step's trace as the store answers it; every rank is a resource of its own."""
    message = pb.TracesData()
    for made in trace.spans:
        of_rank = message.resource_spans.add()
        for key, value in made.resource.items():
            of_rank.resource.attributes.add(key=key, value=any_value(value))
        span = of_rank.scope_spans.add().spans.add(
            trace_id=bytes.fromhex(made.trace_id),
            span_id=bytes.fromhex(made.span_id),
            name=made.name,
            kind=pb.Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=made.start_ns,
            end_time_unix_nano=made.end_ns,
        )
        for key, value in made.attributes.items():
            span.attributes.add(key=key, value=any_value(value))
    return message.SerializeToString()


def too_much(result: dict[str, float]) -> list[str]:
    """A sentence for each limit that a measurement exceeds."""
    limits = {"together, s": MOST_S, "memory, MiB": MOST_MIB}
    return [f"{name}: {result[name]:,}, at most {most:,}" for name, most in limits.items() if result[name] > most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--graphs", action="store_true", help="the steps say no phases")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.steps, options.ranks, options.experts, options.requests, graphs=options.graphs)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"wide-ep: {name:28} {value:,}")
    exceeded = too_much(result)
    for sentence in exceeded:
        print(f"wide-ep: too much: {sentence}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
