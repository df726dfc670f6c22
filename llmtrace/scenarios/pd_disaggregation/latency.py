"""Latencies of the arms: alone, side by side on the same requests, and where the time to first token went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Served
from llmtrace.scenarios.pairing import Conclusion, by_pair, cluster, conclude
from llmtrace.scenarios.pd_disaggregation.arms import ARMS
from llmtrace.scenarios.pd_disaggregation.requests import Handled
from llmtrace.stats import Distribution, Interval, distribution, mean_interval

ArmMetric = Literal["TTFT", "end to end", "TPOT"]
COMPARED: dict[ArmMetric, Callable[[Served], float | None]] = {
    "TTFT": lambda s: s.ttft_ms,
    "end to end": lambda s: s.e2e_ms,
    "TPOT": lambda s: s.tpot_ms,
}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class ArmAnswer(_Model):
    """One arm; ms as the client saw them, ``longest_gap`` between two tokens as the decode server did."""

    arm: str
    requests: int
    failed: int
    split: int
    ttft: Distribution | None
    e2e: Distribution | None
    tpot: Distribution | None
    longest_gap: Distribution | None


class ArmComparison(_Model):
    """The same requests in two arms: what ``candidate`` saves against ``baseline``, mean ms a request.

    The interval is a 95 % bootstrap interval over (block, tenant) clusters.
    """

    candidate: str
    baseline: str
    metric: ArmMetric
    pairs: int
    saved_ms: Interval
    conclusion: Conclusion


class TtftParts(_Model):
    """Where the time to first token went, mean ms of the requests of an arm that were served in one way.

    ``rest`` is what no model server accounts for: client, gateway, picker, sidecar, network.
    """

    arm: str
    split: bool
    requests: int
    prefill_queue: float
    prefill: float
    kv_load: float
    decode_queue: float
    decode_prefill: float
    rest: float
    ttft: float


def arm_answer(arm: str, requests: Iterable[Handled]) -> ArmAnswer:
    """The latencies of one arm."""
    mine = [r for r in requests if r.served.arm == arm]
    good = [r for r in mine if not r.served.failed]

    def measured(value: Callable[[Handled], float | None]) -> Distribution | None:
        return distribution([v for r in good if (v := value(r)) is not None])

    return ArmAnswer(
        arm=arm,
        requests=len(mine),
        failed=len(mine) - len(good),
        split=sum(r.was_split for r in good),
        ttft=measured(lambda r: r.served.ttft_ms),
        e2e=measured(lambda r: r.served.e2e_ms),
        tpot=measured(lambda r: r.served.tpot_ms),
        longest_gap=measured(lambda r: r.legs.decode.longest_gap_ms if r.legs.decode else None),
    )


def compare_arms(served: Iterable[Served], seed: int) -> list[ArmComparison]:
    """Every two arms, for each metric; without those that have fewer than two clusters of pairs."""
    pairs = by_pair(served)
    found = []
    for candidate, baseline in combinations(ARMS, 2):
        both = [(arms[candidate], arms[baseline]) for arms in pairs.values() if {candidate, baseline} <= arms.keys()]
        for metric, value in COMPARED.items():
            told = [(c, b, v, w) for c, b in both if (v := value(c)) is not None and (w := value(b)) is not None]
            saved = mean_interval([w - v for _, _, v, w in told], [cluster(c) for c, *_ in told], seed=seed)
            if saved is not None:
                found.append(
                    ArmComparison(
                        candidate=candidate,
                        baseline=baseline,
                        metric=metric,
                        pairs=len(told),
                        saved_ms=saved,
                        conclusion=conclude(saved),
                    )
                )
    return found


def ttft_parts(requests: Iterable[Handled]) -> list[TtftParts]:
    """The parts of the time to first token, by arm and way; of requests whose servers' phases are all told."""
    groups: dict[tuple[str, bool], list[tuple[float, ...]]] = {}
    for r in requests:
        if (parts := _parts(r)) is not None:
            groups.setdefault((r.served.arm, r.was_split), []).append(parts)
    return [
        _mean_parts(arm, split, groups[arm, split]) for arm in ARMS for split in (True, False) if (arm, split) in groups
    ]


def _parts(request: Handled) -> tuple[float, ...] | None:
    """The fields of :class:`TtftParts` of one request, up to the time to first token."""
    prefill, decode, ttft = request.legs.prefill, request.legs.decode, request.served.ttft_ms
    if ttft is None or decode is None or (request.was_split and prefill is None):
        return None
    engines = [decode] if prefill is None else [prefill, decode]
    if any(e.queue_ms is None or e.prefill_ms is None for e in engines):
        return None
    of_prefill = (prefill.queue_ms or 0.0, prefill.prefill_ms or 0.0) if prefill else (0.0, 0.0)
    load = decode.load.wait_ms if decode.load else 0.0
    told = (*of_prefill, load, decode.queue_ms or 0.0, decode.prefill_ms or 0.0)
    return (*told, ttft - sum(told), ttft)


def _mean_parts(arm: str, split: bool, rows: Sequence[tuple[float, ...]]) -> TtftParts:
    names = ("prefill_queue", "prefill", "kv_load", "decode_queue", "decode_prefill", "rest", "ttft")
    means = {name: fmean(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    return TtftParts(arm=arm, split=split, requests=len(rows), **means)
