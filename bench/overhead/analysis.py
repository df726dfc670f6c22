"""From rounds to numbers: changes against another cell of the same rounds, with intervals, and percentiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

import numpy as np

from bench.overhead.plans import BASE, BUILT_IN_FULL, FULL, OUT, PRESSED, Cell, Plan, Variant
from bench.overhead.rounds import Measured, Sample
from llmtrace.stats import ClusterMeans, Interval

Metric = Callable[[Sample], float]
MS = 1e3
MIB = 1 << 20
STARTS = 6
"""From how many on they are what the bootstrap draws."""


def throughput(sample: Sample) -> float:
    """Output tokens per second."""
    return sample.load.tokens / sample.load.seconds


def ttft(sample: Sample) -> float:
    """Mean time to first token, ms."""
    return mean(each.ttft for each in sample.load.times) * MS


def tpot(sample: Sample) -> float:
    """Mean time per output token after the first, ms."""
    return mean(each.tpot for each in sample.load.times) * MS


def cpu(sample: Sample) -> float:
    """CPU time of the server per request, ms."""
    return sum(sample.cpu) / len(sample.load.times) * MS


@dataclass(frozen=True)
class Percentiles:
    """Of single requests, or gaps; ms."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles:
        return cls(*(float(each) * MS for each in np.percentile(list(seconds), (50, 95, 99))))


@dataclass(frozen=True)
class Summary:
    """One cell over all rounds."""

    requests: int
    tokens_per_s: float
    latency: Percentiles
    ttft: Percentiles
    tpot: Percentiles
    gap: Percentiles
    api_server_ms: float
    """CPU time per request; so the next."""
    engine_core_ms: float
    spans: float
    """Per request, sampled or not; so the next."""
    bytes: float


@dataclass(frozen=True)
class Changes:
    """A cell against another of the same rounds, percent."""

    throughput: Interval
    ttft: Interval
    tpot: Interval
    cpu: Interval


@dataclass(frozen=True)
class Memory:
    """Of a variant, MiB, mean over its starts."""

    rss: float
    pss: float


@dataclass(frozen=True)
class Losses:
    """Spans of a variant that its collector did not take."""

    made: float
    """By what the healthy server sends for a request."""
    lost: float
    log_lines: float
    """What a server's log says of it, mean over the starts."""


@dataclass(frozen=True)
class Result:
    """All numbers of a plan, by the cells' names."""

    plan: Plan
    summaries: dict[str, Summary]
    against_none: dict[str, Changes]
    against_built_in: Changes
    """llmtrace, every request sampled, against vLLM's own tracing."""
    against_itself: dict[str, Changes]
    """Cells of the server with the plugin, against the same process with the hooks out."""
    memory: dict[str, Memory]
    losses: dict[str, Losses]


def analyse(measured: Measured) -> Result:
    cells = measured.plan.cells
    pressed = [cell for cell in (FULL, *PRESSED) if cell in cells]
    return Result(
        measured.plan,
        {cell.name: summary(measured, cell) for cell in cells},
        {cell.name: changes(measured, cell, BASE) for cell in cells if cell != BASE},
        changes(measured, FULL, BUILT_IN_FULL),
        {
            cell.name: changes(measured, cell, OUT)
            for cell in cells
            if OUT in cells and cell.variant == OUT.variant and cell != OUT
        },
        {cell.name: memory(measured, cell.variant) for cell in cells},
        {cell.name: losses(measured, cell.variant) for cell in pressed},
    )


def changes(measured: Measured, cell: Cell, base: Cell) -> Changes:
    return Changes(*(change(measured, cell, base, metric) for metric in (throughput, ttft, tpot, cpu)))


def change(measured: Measured, cell: Cell, base: Cell, metric: Metric) -> Interval:
    """By how many percent ``cell`` is above ``base``, of the same rounds: geometric mean, 95 % interval.

    With STARTS starts or more the bootstrap draws whole starts, for what two processes of one program differ by stays
    with them all their life; with fewer, it draws rounds.
    """
    bases = {(each.start, each.round): metric(each) for each in measured.samples if each.cell == base}
    samples = [each for each in measured.samples if each.cell == cell]
    ratios = [math.log(metric(each) / bases[each.start, each.round]) for each in samples]
    by_start = measured.plan.starts >= STARTS
    means = ClusterMeans([each.start if by_start else (each.start, each.round) for each in samples])
    interval = means.interval(means.sums(np.asarray(ratios)))
    return Interval(**{name: math.expm1(value) * 100 for name, value in interval})


def summary(measured: Measured, cell: Cell) -> Summary:
    samples = [each for each in measured.samples if each.cell == cell]
    times = [each for sample in samples for each in sample.load.times]
    count = len(times)
    return Summary(
        count,
        sum(each.load.tokens for each in samples) / sum(each.load.seconds for each in samples),
        Percentiles.of(each.latency for each in times),
        Percentiles.of(each.ttft for each in times),
        Percentiles.of(each.tpot for each in times),
        Percentiles.of(gap for each in times for gap in each.gaps),
        sum(each.cpu.api_server for each in samples) / count * MS,
        sum(each.cpu.engine_core for each in samples) / count * MS,
        sum(each.exported.spans for each in samples) / count,
        sum(each.exported.bytes for each in samples) / count,
    )


def memory(measured: Measured, variant: Variant) -> Memory:
    found = [each.memory for each in measured.usages if each.variant == variant]
    return Memory(mean(each.rss for each in found) / MIB, mean(each.pss for each in found) / MIB)


def losses(measured: Measured, variant: Variant) -> Losses:
    healthy = [each for each in measured.usages if each.variant == FULL.variant]
    per_request = sum(each.exported.spans for each in healthy) / sum(each.sampled for each in healthy)
    found = [each for each in measured.usages if each.variant == variant]
    made = sum(each.sampled for each in found) * per_request
    taken = sum(each.exported.spans for each in found)
    return Losses(made, made - taken, mean(each.complaints for each in found))
