"""Checks of one source of an answer's numbers against another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Block, Served

MOST_LISTED = 20
"""Disagreements of a check that are listed one by one."""


class Check(BaseModel):
    """A check of one source of numbers against another; ``ok`` is None where there was nothing to compare."""

    model_config = ConfigDict(frozen=True)
    name: str
    ok: bool | None
    compared: int
    detail: str
    disagreements: list[str]


class Prefilled(NamedTuple):
    """A prompt that a server prefilled, and the tokens of it that came from its own cache."""

    arm: str
    block: int
    server: str | None
    prompt_tokens: int
    cached_tokens: int


def check(name: str, compared: int, differ: Sequence[str], agreement: str, note: str = "") -> Check:
    """A check of ``compared`` pairs of numbers, of which these differ; ``agreement`` says that none does."""
    detail = "nothing to compare" if not compared else agreement if not differ else f"{len(differ)} differ"
    return Check(
        name=name,
        ok=not differ if compared else None,
        compared=compared,
        detail=detail + (f"; {note}" if note and compared else ""),
        disagreements=list(differ[:MOST_LISTED]),
    )


def every_request_has_its_trace(served: Sequence[Served], blocks: Sequence[Block]) -> Check:
    """The traces against the number of requests that the driver says it sent."""
    expected = sum(b.requests for b in blocks)
    return Check(
        name="every request that was sent has its trace",
        ok=len(served) == expected,
        compared=expected,
        detail=f"{len(served)} traces of {expected} requests",
        disagreements=[],
    )


def equal(name: str, served: Iterable[Served], values: Callable[[Served], tuple[int | None, int | None]]) -> Check:
    """Two numbers of each request must be equal; None is one that the trace lacks."""
    listed = [(s, *values(s)) for s in served]
    untold = sum(left is None or right is None for _, left, right in listed)
    differ = [
        f"{s.trace_id} ({s.arm}): {left} and {right}"
        for s, left, right in listed
        if left is not None and right is not None and left != right
    ]
    note = f"{untold} requests lack one of the two" if untold else ""
    return check(name, len(listed) - untold, differ, "equal for every request", note)


def counters(
    name: str, source: str, prefilled: Iterable[Prefilled], blocks: Sequence[Block], kv_block_size: int
) -> Check:
    """Prompts against vLLM's own counters, for each server and block: equal within one KV block per prompt.

    ``source`` names, for people, where the prompts' numbers are from.
    """
    by_place: dict[tuple[str, int, str | None], list[Prefilled]] = {}
    for p in prefilled:
        by_place.setdefault((p.arm, p.block, p.server), []).append(p)
    differ, checked, worst = [], 0, 0
    for block in blocks:
        for server, hits in block.hits.items():
            here = by_place.get((block.arm, block.block, server), [])
            cached, prompt = sum(p.cached_tokens for p in here), sum(p.prompt_tokens for p in here)
            checked += 1
            worst = max(worst, abs(hits - cached))
            where = f"{server}, {block.arm}, block {block.block}"
            if abs(hits - cached) > kv_block_size * len(here):
                differ.append(f"{where}: {source} {cached} cached tokens, vLLM's counter {hits}")
            queries = block.queries.get(server)
            if queries is not None and abs(queries - prompt) > kv_block_size * len(here):
                differ.append(f"{where}: {source} {prompt} prompt tokens, vLLM's counter {queries}")
    detail = f"at most {worst} tokens apart (allowed: {kv_block_size} per request)" if checked else "nothing to compare"
    return Check(
        name=name,
        ok=not differ if checked else None,
        compared=checked,
        detail=detail,
        disagreements=differ[:MOST_LISTED],
    )
