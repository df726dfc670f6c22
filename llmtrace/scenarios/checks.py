"""Checks of one source of an answer's numbers against another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from llmtrace.scenarios.facts import Block, Served

MOST_LISTED = 20
"""Disagreements of a check that are listed one by one."""

T = TypeVar("T")


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
    """Two numbers of each request must be equal."""
    return compared(
        name,
        ((s, *values(s)) for s in served),
        lambda left, right: left == right,
        agreement="equal for every request",
    )


def compared(
    name: str,
    rows: Iterable[tuple[Served, T | None, T | None]],
    agrees: Callable[[T, T], bool],
    *,
    agreement: str,
) -> Check:
    """Two values of each request must agree; None is a value that the trace lacks."""
    listed = list(rows)
    untold = sum(left is None or right is None for _, left, right in listed)
    differ = [
        f"{s.trace_id} ({s.arm}): {left} and {right}"
        for s, left, right in listed
        if left is not None and right is not None and not agrees(left, right)
    ]
    told = len(listed) - untold
    detail = "nothing to compare" if not told else agreement if not differ else f"{len(differ)} differ"
    if untold and told:
        detail += f"; {untold} requests lack one of the two"
    return Check(
        name=name,
        ok=not differ if told else None,
        compared=told,
        detail=detail,
        disagreements=differ[:MOST_LISTED],
    )


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
            if abs(block.queries[server] - prompt) > kv_block_size * len(here):
                differ.append(f"{where}: {source} {prompt} prompt tokens, vLLM's counter {block.queries[server]}")
    detail = f"at most {worst} tokens apart (allowed: {kv_block_size} per request)" if checked else "nothing to compare"
    return Check(
        name=name,
        ok=not differ if checked else None,
        compared=checked,
        detail=detail,
        disagreements=differ[:MOST_LISTED],
    )
