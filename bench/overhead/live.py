"""What the plugin's hooks take of each step in a running server, where other code has had the processor's caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.overhead import load
from bench.overhead.plans import TIMED, Plan
from bench.overhead.rounds import WARM_UP_ROUNDS, prepare
from bench.overhead.servers import Server, serve


@dataclass(frozen=True)
class Live:
    """Microseconds per step, the ends of requests included; and how long a step was."""

    engine: float
    """In the engine core."""
    engine_median: float
    """Its median, a step in which no request ends."""
    api_server: float
    step: float
    """From one to the next, as clients see it: the median of their TPOT."""


def measure(plan: Plan, model: Path, plugin: Path, folder: Path) -> dict[str, Live]:
    """By the share of requests sampled, 0% and 100%, with the load of one start of ``plan``."""
    logs = folder / "live"
    logs.mkdir()
    with serve(model, (TIMED,), plugin, logs) as servers:
        server = servers[TIMED]
        _drive(server, plan, 1.0, range(-WARM_UP_ROUNDS, 0))
        return {f"{sampling:.0%}": _drive(server, plan, sampling, range(plan.rounds)) for sampling in (0.0, 1.0)}


def _drive(server: Server, plan: Plan, sampling: float, numbers: range) -> Live:
    tpots: list[float] = []
    for number in numbers:
        messages = prepare(plan, number, f"{number}-{sampling:.0%}", sampling).messages
        tpots += [each.tpot for each in load.drive(server.port, messages, plan.concurrency).times]
    found = server.times()
    engine = [found["schedule"], found["update_from_output"]]
    return Live(
        sum(each["mean"] for each in engine),
        sum(each["median"] for each in engine),
        found["process_outputs"]["mean"],
        median(tpots) * 1e6,
    )
