"""What the plugin's hooks take of each step in a running server, where other code has had the processor's caches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from bench.overhead import load
from bench.overhead.plans import TIMED, TINY
from bench.overhead.servers import Server, serve

ROUNDS = 8


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


def measure(model: Path, plugin: Path, folder: Path) -> dict[str, Live]:
    """By the share of requests sampled, 0% and 100%, with the load of the tiny model's plan."""
    logs = folder / "live"
    logs.mkdir()
    with serve(model, (TIMED,), plugin, logs) as servers:
        server = servers[TIMED]
        _drive(server, "warm-up", sampled=True)
        server.times()
        return {share: _drive(server, share, sampled=share == "100%") for share in ("0%", "100%")}


def _drive(server: Server, name: str, *, sampled: bool) -> Live:
    tpots = []
    for number in range(ROUNDS):
        asked = load.requests(number, TINY.requests, TINY.prompt_tokens, TINY.output_tokens, TINY.vocabulary)
        ids = random.Random(f"{name} {number}")
        salt = f"{name}-{number}"
        messages = [load.encode(request, salt=salt, sampled=sampled, ids=ids) for request in asked]
        tpots += [each.tpot for each in load.drive(server.port, messages, TINY.concurrency).times]
    found = server.times()
    engine = [found["schedule"], found["update_from_output"]]
    return Live(
        sum(each["mean"] for each in engine),
        sum(each["median"] for each in engine),
        found["process_outputs"]["mean"],
        sorted(tpots)[len(tpots) // 2] * 1e6,
    )
