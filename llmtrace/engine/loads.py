"""The loads of remote KV in one scheduler: what was asked for, when it was there, what the connector says of it.

Only those of requests that wait for their first admission; a load of a resumed request belongs to its preemption.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection
from typing import Any

from llmtrace.engine.facts import Facts, Load

_REMOTE_KV = "WAITING_FOR_REMOTE_KVS"
_UNHASHED = "get_unhashed_block_ids_all_groups"


class Loads:
    """Fills ``Facts.loads``. Its methods are called in the order in which the engine's loop has them."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._block_sizes = _block_sizes(scheduler)
        self._arrived: dict[str, Load] = {}
        """Loads that ended in this step."""

    @property
    def possible(self) -> bool:
        """Whether this engine can load KV at all."""
        return getattr(self._scheduler, "connector", None) is not None

    def clear(self) -> None:
        """Let go of everything."""
        self._arrived.clear()

    def scheduled(self, request: Any, facts: Facts, now: float) -> None:
        """A step was scheduled, without ``request``: perhaps a load of its KV began; ``now`` in monotonic s."""
        status = getattr(request, "status", None)
        over = getattr(self._scheduler, "finished_recving_kv_req_ids", ())
        if getattr(status, "name", None) != _REMOTE_KV or request.request_id in over:
            return
        if not facts.loads or facts.loads[-1].end is not None:
            facts.loads.append(self._begin(request, now))

    def received(self, request_id: str, facts: Facts, received: Collection[str], connector_output: Any) -> None:
        """The model ran, and the connector has ``received`` the KV of these requests, of this one among others."""
        if not facts.loads or facts.loads[-1].end is not None:
            return
        load = facts.loads[-1]
        load.end = time.monotonic()
        self._arrived[request_id] = load
        if len(received) == 1:
            load.transfer = _transfer_time(getattr(connector_output, "kv_connector_stats", None), load.size)

    def updated(self) -> None:
        """The scheduler has taken the step's results in, and knows which of the loads failed."""
        if not self._arrived:
            return
        failed = getattr(self._scheduler, "failed_recving_kv_req_ids", ())
        for request_id, load in self._arrived.items():
            load.failed |= request_id in failed
        self._arrived.clear()

    def _begin(self, request: Any, now: float) -> Load:
        stats = getattr(request, "prefill_stats", None)
        load = Load(now, tokens=getattr(stats, "num_external_cached_tokens", 0) or 0)
        get_blocks = getattr(getattr(self._scheduler, "kv_cache_manager", None), "get_blocks", None)
        unhashed = getattr(get_blocks(request.request_id), _UNHASHED, None) if get_blocks is not None else None
        if unhashed is not None:
            to_fill = [len(ids) for ids in unhashed()]
            load.blocks = sum(to_fill)
            if len(to_fill) == len(self._block_sizes):
                load.size = sum(map(operator.mul, to_fill, self._block_sizes))
        return load


def note_failure(request: Any, facts: Facts, tokens: int) -> None:
    """Put the facts of an admission right after a load that failed; ``tokens`` are those of its first step.

    vLLM's own numbers may still be those of its hope. What is computed starts where the good blocks end.
    """
    if not facts.loads or not facts.loads[-1].failed or facts.local_cached_tokens is None:
        return
    cached = max(getattr(request, "num_computed_tokens", tokens) - tokens, 0)
    facts.local_cached_tokens = min(facts.local_cached_tokens, cached)
    facts.external_cached_tokens = cached - facts.local_cached_tokens
    facts.computed_tokens = facts.prompt_tokens - cached


def _block_sizes(scheduler: Any) -> list[int]:
    """Bytes of a KV cache block of each KV cache group, over all layers and workers; empty where unknown."""
    parallel = getattr(scheduler.vllm_config, "parallel_config", None)
    workers = getattr(parallel, "tensor_parallel_size", 1) * getattr(parallel, "pipeline_parallel_size", 1)
    groups = getattr(getattr(scheduler, "kv_cache_config", None), "kv_cache_groups", ())
    sizes = [
        workers
        * len(getattr(group, "layer_names", ()))
        * getattr(getattr(group, "kv_cache_spec", None), "page_size_bytes", 0)
        for group in groups
    ]
    return sizes if all(sizes) else []


def _transfer_time(stats: Any, size: int | None) -> float | None:
    """Seconds of the longest transfer that NIXL reports for a step, unless they could be those of another load too.

    They are this load's if all of them together are ``size`` bytes.
    """
    data = getattr(stats, "data", None)
    if not isinstance(data, dict):
        return None
    durations, sizes = data.get("transfer_duration"), data.get("bytes_transferred")
    return float(max(durations)) if durations and sizes and sum(sizes) == size else None
