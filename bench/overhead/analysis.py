"""From rounds to numbers: changes against another cell of the same rounds, with intervals, and percentiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from bench.overhead.plans import Cell, Variant
from bench.overhead.rounds import Measured, Sample, Usage
from llmtrace.stats import Interval, cluster_bootstrap

Metric = Callable[[Sample], float]
MS = 1e3


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

    cell: Cell
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
class Memory:
    """Of a variant, MiB, mean over its starts."""

    rss: float
    pss: float


@dataclass(frozen=True)
class Losses:
    """Spans of a variant that its collector did not take."""

    made: float
    """By what the healthy server sends for a request."""
    taken: int
    log_lines: int
    """What the server's log says of it."""


def change(measured: Measured, cell: Cell, base: Cell, metric: Metric) -> Interval:
    """By how many percent ``cell`` is above ``base``, of the same rounds: geometric mean, 95 % interval.

    The bootstrap draws whole starts if there are enough of them, for what two processes of one program differ by stays
    with them all their life; else rounds.
    """
    found = {(each.start, each.round): metric(each) for each in measured.samples if each.cell == base}
    pairs = [
        (each.start, each.round, np.log(metric(each) / found[each.start, each.round]))
        for each in measured.samples
        if each.cell == cell
    ]
    clusters: Sequence[object] = [(start, number) for start, number, _ in pairs]
    interval = cluster_bootstrap([float(each) for *_, each in pairs], clusters, lambda values: float(np.mean(values)))
    return Interval(**{name: percent(value) for name, value in interval})


def percent(log_ratio: float) -> float:
    return float(np.expm1(log_ratio)) * 100


def summary(measured: Measured, cell: Cell) -> Summary:
    samples = [each for each in measured.samples if each.cell == cell]
    times = [each for sample in samples for each in sample.load.times]
    count = len(times)
    return Summary(
        cell,
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
    return Memory(mean(each.rss for each in found) / 2**20, mean(each.pss for each in found) / 2**20)


def losses(measured: Measured, variant: Variant, healthy: Variant) -> Losses:
    def total(of: Variant, value: Callable[[Usage], int]) -> int:
        return sum(value(each) for each in measured.usages if each.variant == of)

    per_request = total(healthy, lambda each: each.exported.spans) / total(healthy, lambda each: each.sampled)
    return Losses(
        total(variant, lambda each: each.sampled) * per_request,
        total(variant, lambda each: each.exported.spans),
        total(variant, lambda each: each.complaints),
    )
