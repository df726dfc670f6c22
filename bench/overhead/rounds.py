"""The measurement: rounds in which every cell gets the same requests, one server at a time, in shuffled order."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.overhead import load
from bench.overhead.plans import BUILT_IN, OUT, PLUGIN, Cell, Plan, Variant
from bench.overhead.servers import Cpu, Memory, Server, serve
from bench.sink import Counts

SETTLE_S = 0.75
"""After a load, so that the last batch of spans is exported, and paid for, before the next server's turn."""
WARM_UP_ROUNDS = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One cell in one round."""

    cell: Cell
    start: int
    round: int
    load: load.Load
    sampled: int
    """Requests of it that were sampled."""
    cpu: Cpu
    """Seconds, for all of the requests."""
    exported: Counts


@dataclass(frozen=True)
class Usage:
    """One server at the end of its life."""

    variant: Variant
    start: int
    memory: Memory
    sampled: int
    """Sampled requests of all rounds."""
    exported: Counts
    """What its collector took of them."""
    complaints: int
    """Lines about exports and drops in its log."""


@dataclass(frozen=True)
class Measured:
    """Everything from one plan."""

    plan: Plan
    samples: list[Sample]
    usages: list[Usage]


def measure(plan: Plan, model: Path, plugin: Path, folder: Path, say: Say) -> Measured:
    """Run ``plan`` with ``model``; ``plugin`` is the folder with the plugin, ``folder`` takes the logs."""
    measured = Measured(plan, [], [])
    for start in range(plan.starts):
        say(f"{plan.model}: starting {len(plan.variants)} servers ({start + 1} of {plan.starts})")
        logs = folder / f"{model.name}-{start}"
        logs.mkdir()
        with serve(model, plan.variants, plugin, logs) as servers:
            _Start(plan, start, servers, say).run(measured)
    return measured


class Round(NamedTuple):
    """What a server is sent in one round, ready to go."""

    messages: list[bytes]
    sampled: int
    """Requests of it that are sampled."""
    tokens: int
    """That the server has to make."""


def prepare(plan: Plan, number: int, name: str, sampling: float) -> Round:
    """Requests of a round; the same prompts and lengths for every ``name``, of which each has prefixes of its own."""
    ids = random.Random(name)
    asked = load.requests(number, plan.requests, plan.prompt_tokens, plan.output_tokens, plan.vocabulary)
    flags = [ids.random() < sampling for _ in asked]
    messages = [
        load.encode(request, salt=name, sampled=flag, ids=ids) for request, flag in zip(asked, flags, strict=True)
    ]
    return Round(messages, sum(flags), sum(request.max_tokens for request in asked))


class _Start:
    """The rounds of one set of servers."""

    def __init__(self, plan: Plan, start: int, servers: dict[Variant, Server], say: Say) -> None:
        self._plan = plan
        self._start = start
        self._servers = servers
        self._say = say
        self._hooks = dict.fromkeys(servers, True)
        self._count_anew()  # vLLM traces its own start as well

    def _count_anew(self) -> None:
        self._sampled = dict.fromkeys(self._servers, 0)
        self._before = {variant: server.exported() for variant, server in self._servers.items()}

    def run(self, measured: Measured) -> None:
        for number in range(-WARM_UP_ROUNDS, 0):
            for variant in self._servers:
                self._cell(Cell(variant, 1.0), number)
        self._check_spans()
        if OUT in self._plan.cells:
            self._check_switch()
        self._count_anew()
        for number in range(self._plan.rounds):
            cells = list(self._plan.cells)
            random.Random(f"{self._start} {number}").shuffle(cells)
            began = time.monotonic()
            measured.samples.extend(self._cell(cell, number) for cell in cells)
            self._say(
                f"{self._plan.model}: round {number + 1} of {self._plan.rounds}, {time.monotonic() - began:.0f} s"
            )
        for variant, server in self._servers.items():
            sampled = self._sampled[variant] if variant.traced else 0
            measured.usages.append(
                Usage(variant, self._start, server.memory(), sampled, self._exported(variant), server.complaints())
            )

    def _cell(self, cell: Cell, number: int) -> Sample:
        server = self._servers[cell.variant]
        round_ = prepare(self._plan, number, f"{self._start}-{number}-{cell.name}", cell.sampling)
        if cell.hooks != self._hooks[cell.variant]:
            server.switch(cell.hooks)
            self._hooks[cell.variant] = cell.hooks
        cpu, exported = server.cpu(), server.exported()
        done = load.drive(server.port, round_.messages, self._plan.concurrency)
        time.sleep(SETTLE_S)
        self._sampled[cell.variant] += round_.sampled
        if done.tokens != round_.tokens:
            sys.exit(f"{cell.variant.name} made {done.tokens} tokens, not those asked for; its log: {server.log}")
        return Sample(
            cell,
            self._start,
            number,
            done,
            round_.sampled,
            server.cpu().since(cpu),
            server.exported().since(exported),
        )

    def _exported(self, variant: Variant) -> Counts:
        return self._servers[variant].exported().since(self._before[variant])

    def _check_spans(self) -> None:
        """End the program where a server does not trace as its variant says: its numbers would mean nothing."""
        for variant, least, most in ((BUILT_IN, 1, 1), (PLUGIN, 3, 4)):
            server = self._servers.get(variant)
            if server is not None:
                self._check_count(variant, self._sampled[variant], self._exported(variant).spans, least, most)

    def _check_switch(self) -> None:
        """The same for a server whose hooks are out: it has to send vLLM's own spans, and no others."""
        sample = self._cell(Cell(PLUGIN, 1.0, hooks=False), -1)
        self._check_count(PLUGIN, sample.sampled, sample.exported.spans, 1, 1)

    def _check_count(self, variant: Variant, sampled: int, spans: int, least: int, most: int) -> None:
        if not least * sampled <= spans <= most * sampled:
            log = self._servers[variant].log.read_text()
            sys.exit(f"{variant.name}: {spans} spans for {sampled} requests; its log:\n{log[-4000:]}")
