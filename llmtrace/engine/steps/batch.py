"""Counts an engine's forward passes beside its scheduler, and tells the workers what each of them runs.

The description is a tuple of plain values, put on vLLM's SchedulerOutput as one more attribute: it is pickled along
with it, and a worker without this plugin can still read the rest. Of a step that is not traced it has the group and the
number only.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llmtrace.engine.facts import is_sampled
from llmtrace.engine.hooks import Guard
from llmtrace.engine.steps.demand import NONE, Demand, hear
from llmtrace.engine.steps.ids import agree, every, new_name

ATTRIBUTE = "llmtrace_step"
MAX_LINKS = 64
"""Callers' spans that a step links to."""
MOST_COUNTED = 256
"""Requests in the queue whose prompts are counted; those of a longer queue are taken to be like its first ones."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a traced forward pass runs.

    ``callers`` are ``traceparent`` headers of its sampled requests; ``unlinked`` more are too many to link to.
    ``waiting_tokens`` are those of the prompts in the queue, cached ones included; an estimate where more than
    :data:`MOST_COUNTED` requests wait.

    A dummy pass has no requests. ``on_demand``: it is traced for a slow request, and does not belong to the sample of
    one in so many.
    """

    group: str
    number: int
    dummy: bool = False
    prefill_requests: int = 0
    prefill_tokens: int = 0
    decode_requests: int = 0
    decode_tokens: int = 0
    kv_read_tokens: int = 0
    waiting_requests: int | None = None
    callers: tuple[str, ...] = ()
    unlinked: int = 0
    waiting_tokens: int | None = None
    on_demand: bool = False

    @property
    def tokens(self) -> int:
        """Tokens computed for requests."""
        return self.prefill_tokens + self.decode_tokens


class Batches:
    """The forward passes of one engine, in order. ``guard`` runs all that is done for steps beside the scheduler."""

    def __init__(self, scheduler: Any, guard: Guard, environment: Mapping[str, str] = os.environ) -> None:
        self._scheduler = scheduler
        self.guard = guard
        self._every = every(environment)
        self.group = ""
        self.number = 0
        self.window = NONE
        """Steps that are traced on demand."""
        parallel = scheduler.vllm_config.parallel_config
        self.rank = first_rank(parallel)
        """Of the engine's first worker in the group."""
        engines = int(getattr(parallel, "data_parallel_size", 1))
        self.demand = Demand(self, engines, environment)
        if engines == 1:
            self.group = new_name()

    @property
    def on_demand(self) -> bool:
        """Whether the newest step, if it is traced, is none of the sample."""
        return self.number % self._every != 0

    def join(self, engine: Any) -> None:
        """Agree with the other engine cores on the group's name, before ``engine``'s loop begins; tell its workers."""
        self.group = agree(engine.dp_store)
        engine.model_executor.collective_rpc(hear, args=(self.group, NONE.start, NONE.stop))
        self.demand.join(engine.dp_store)

    def scheduled(self, output: Any) -> Iterable[str]:
        """A step was scheduled: tell the workers. Returns the ids of its requests if it is traced."""
        return (self.guard.run("counting steps", self._count, output) or ()) if self.guard.on else ()

    def _count(self, output: Any) -> Iterable[str]:
        tokens: Mapping[str, int] = output.num_scheduled_tokens
        if not output.total_num_scheduled_tokens:
            return ()  # nothing to compute: no forward pass
        if self.demand.pending:
            self.demand.decide()
        self.number += 1
        if not self.group:
            return ()
        if self.number % self._every and self.number not in self.window:
            setattr(output, ATTRIBUTE, (self.group, self.number))
            return ()
        setattr(output, ATTRIBUTE, self._describe(tokens))
        return tokens

    def dummy(self, engine: Any) -> None:
        """A pass without requests is next: the workers know by themselves, but for the window."""
        self.number += 1
        if self.number in self.window:
            self.demand.tell(engine)

    def _describe(self, tokens: Mapping[str, int]) -> tuple[Any, ...]:
        prefill_requests = prefill_tokens = decode_tokens = read = 0
        callers: list[str] = []
        unlinked = 0
        for request_id, count in tokens.items():
            request = self._scheduler.requests.get(request_id)
            if request is None:
                continue
            after = request.num_computed_tokens
            read += after
            if after - count < request.num_prompt_tokens:
                prefill_requests += 1
                prefill_tokens += count
            else:
                decode_tokens += count
            headers = request.trace_headers
            if not is_sampled(headers):
                continue
            if len(callers) < MAX_LINKS:
                callers.append(headers["traceparent"])
            else:
                unlinked += 1
        counts = getattr(self._scheduler, "get_request_counts", None)
        return (
            *(self.group, self.number, False, prefill_requests, prefill_tokens),
            *(len(tokens) - prefill_requests, decode_tokens, read, None if counts is None else int(counts()[1])),
            *(tuple(callers), unlinked, _prompt_tokens(getattr(self._scheduler, "waiting", None)), self.on_demand),
        )


def _prompt_tokens(queue: Any) -> int | None:
    """Of the requests in vLLM's queue; None of one by priority, through which no cheap way leads."""
    if not isinstance(queue, deque):
        return None
    counted = [request.num_prompt_tokens for request in islice(queue, MOST_COUNTED)]
    return round(sum(counted) * len(queue) / len(counted)) if counted else 0


def first_rank(parallel: Any) -> int:
    """In the group of all data-parallel engines, of an engine's first worker."""
    return int(getattr(parallel, "data_parallel_rank", 0) or 0) * int(getattr(parallel, "world_size", 1))
