"""What is measured: the servers side by side, the sampling rates, and the load for each of the models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llmtrace.stack import cache_home

VLLM_VERSION = "0.32.0"
PYTHON = cache_home() / f"vllm/{VLLM_VERSION}/bin/python"
SMOLLM2 = cache_home() / "model/SmolLM2-135M-Instruct-0.1.2"

Collector = Literal["up", "hangs", "down"]


@dataclass(frozen=True)
class Variant:
    """How a server is started."""

    name: str
    traced: bool = True
    plugin: bool = False
    collector: Collector = "up"
    """Whether what its spans are sent to answers, answers long after the exporter's timeout, or is not there."""
    timed: bool = False
    """Its hooks are timed (:mod:`bench.overhead.inside`)."""
    step_every: int | None = None
    """Of a mixture of experts, steps of which one is traced; None: what the plugin does if nobody says otherwise."""


NONE = Variant("no tracing", traced=False)
CONTROL = Variant("no tracing, again", traced=False)
BUILT_IN = Variant("vLLM's own")
PLUGIN = Variant("llmtrace", plugin=True)
HANGS = Variant("llmtrace, collector hangs", plugin=True, collector="hangs")
DOWN = Variant("llmtrace, collector down", plugin=True, collector="down")
TIMED = Variant("llmtrace, timed", plugin=True, timed=True)
NO_STEPS = Variant("llmtrace, no steps", plugin=True, step_every=0)
EVERY_STEP = Variant("llmtrace, every step", plugin=True, step_every=1)


@dataclass(frozen=True)
class Cell:
    """One server under one sampling rate: what a round measures once."""

    variant: Variant
    sampling: float
    """Share of the requests whose ``traceparent`` is sampled."""
    hooks: bool = True
    """False: the plugin's hooks are taken out of the running server for this cell."""

    @property
    def name(self) -> str:
        if not self.hooks:
            return f"{self.variant.name}, hooks out"
        return f"{self.variant.name}, {self.sampling:.0%}" if self.variant.traced else self.variant.name


BASE = Cell(NONE, 0.0)
NOISE = Cell(CONTROL, 0.0)
BUILT_IN_FULL = Cell(BUILT_IN, 1.0)
FULL = Cell(PLUGIN, 1.0)
COMPARED = (BASE, BUILT_IN_FULL, FULL)
OUT = Cell(PLUGIN, 0.0, hooks=False)
"""What a server with the plugin is compared with where it shall be itself."""
LADDER = (Cell(PLUGIN, 0.0), Cell(PLUGIN, 0.01), Cell(PLUGIN, 0.1), FULL)
PRESSED = (Cell(HANGS, 1.0), Cell(DOWN, 1.0))
STEPS = (Cell(NO_STEPS, 1.0), Cell(EVERY_STEP, 1.0))


@dataclass(frozen=True)
class Plan:
    """A model, its load, and the cells that every round goes through in an order of its own."""

    model: str
    path: Path | None
    """None: the tiny model that the bench makes."""
    cells: tuple[Cell, ...]
    starts: int
    """Times that all servers are started anew: two processes of the same program differ a little all their life."""
    rounds: int
    """Per start."""
    requests: int
    """Per round and cell."""
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int
    kind: str = "dense"
    """Of the tiny model (``bench/tiny_model.py``)."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(dict.fromkeys(cell.variant for cell in self.cells))


TINY = Plan(
    model="tiny, random weights",
    path=None,
    cells=tuple(dict.fromkeys((*COMPARED, NOISE, OUT, *LADDER, *PRESSED))),
    starts=6,
    rounds=4,
    requests=96,
    concurrency=8,
    prompt_tokens=128,
    output_tokens=64,
    vocabulary=250,
)
SMOL = Plan(
    model="SmolLM2-135M-Instruct",
    path=SMOLLM2,
    cells=(*COMPARED, NOISE, OUT),
    starts=4,
    rounds=5,
    requests=12,
    concurrency=4,
    prompt_tokens=128,
    output_tokens=24,
    vocabulary=40_000,
)
MOE = replace(
    TINY,
    model="tiny mixture of experts, random weights",
    kind="moe",
    cells=(*COMPARED, NOISE, *STEPS),
    starts=4,
    rounds=4,
)
PLANS = {"tiny": TINY, "smollm2": SMOL, "moe": MOE}

QUICK = replace(TINY, cells=tuple(dict.fromkeys((*COMPARED, OUT, *LADDER))), starts=1, rounds=2, requests=48)
"""A smoke run."""
