"""The worker's side: begins and ends the steps, and marks the phases where vLLM does them."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmtrace.engine.compat import STEP_HOOKS, check, owner_of
from llmtrace.engine.drops import publish_steps
from llmtrace.engine.hooks import After, Before, Guard, Switch, logger, wrap
from llmtrace.engine.meters import meter
from llmtrace.engine.steps.batch import ATTRIBUTE, Batch, first_rank
from llmtrace.engine.steps.clocks import Clock, CudaClock, HostClock
from llmtrace.engine.steps.demand import heard
from llmtrace.engine.steps.experts import ExpertTokens
from llmtrace.engine.steps.ids import every, experts_every
from llmtrace.engine.steps.recorder import COMBINE, DISPATCH, EXPERTS, WAIT, Recorder
from llmtrace.engine.steps.sender import Rank, Sender, exporter, node_name
from llmtrace.engine.steps.totals import Totals
from llmtrace.semconv import attributes as names

Bodies = dict[str, tuple[Before | None, After | None]]
EAGER_ONLY = ("reduce_final_output", "all_reduce")
"""Hooks inside of what torch.compile takes apart: they exist only where nothing is compiled."""


class StepWorker:
    """One worker's steps. Its bodies run under ``guard``, with the wrapped function's own arguments."""

    def __init__(self, recorder: Recorder, sender: Sender, expert_tokens: ExpertTokens | None, guard: Guard) -> None:
        self.recorder = recorder
        self.expert_tokens = expert_tokens
        self._sender = sender
        self._guard = guard
        self._guard.on_off(self._forget)
        self._every = every(os.environ)
        self._experts_every = experts_every(os.environ)
        self._group = ""
        self._number = 0
        self._is_told = True
        """Whether the engine core still says the number of each step."""
        self._watching: list[Any] = []
        """Handles of torch's hooks on the model."""

    def step_bodies(self) -> Bodies:
        """Of the hooks that run in every step, and between steps."""
        return {
            "execute_model": (self._beginning, self._ended),
            "execute_dummy_batch": (self._beginning_dummy, self._ended),
            "rearrange": (self._rearranging, self._rearranged),
        }

    def expert_bodies(self, counts: ExpertTokens) -> Bodies:
        """Of the hook that runs while ``counts`` is on."""

        def routed(router: Any, topk_ids: Any, *_args: Any, **_kwargs: Any) -> None:
            counts.count(topk_ids, _logical_experts(router))

        return {"eplb_mapping": (routed, None)}

    def phase_bodies(self) -> Bodies:
        """Of the hooks that run only while a traced step is recorded."""
        return {
            "prepare": self._phase(DISPATCH),
            "fused_experts": self._phase(EXPERTS),
            "finalize": self._phase(COMBINE),
            "reduce_final_output": self._phase(COMBINE),
            "all_reduce": self._phase(WAIT),
            "dp_sync": self._phase(WAIT),
            "dp_sync_v2": self._phase(WAIT),
        }

    def _phase(self, name: str) -> tuple[Before, After]:
        recorder = self.recorder

        def before(*_args: Any, **_kwargs: Any) -> None:
            recorder.enter()

        def after(*_args: Any, **_kwargs: Any) -> None:
            recorder.leave(name)

        return before, after

    def _beginning(self, worker: Any, scheduler_output: Any, *_args: Any, **_kwargs: Any) -> None:
        told: tuple[Any, ...] | None = getattr(scheduler_output, ATTRIBUTE, None)
        if told is None:
            # vLLM's warm-up, or no forward pass; or the engine core's part of steps was switched off.
            self._is_told = not self._group or not scheduler_output.total_num_scheduled_tokens
            if self.recorder.on:
                self._forget()
            return
        self._is_told = True
        self._group, self._number = told[:2]
        self._forget()
        if len(told) > 2:
            self._begin(worker, Batch(*told))

    def _beginning_dummy(self, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        self._number += 1
        self._forget()
        self._group = self._group or heard.group
        on_demand = self._number % self._every != 0
        if self._group and self._is_told and (not on_demand or self._number in heard.window):
            self._begin(worker, Batch(self._group, self._number, dummy=True, on_demand=on_demand))

    def _begin(self, worker: Any, batch: Batch) -> None:
        if self.expert_tokens is not None and batch.tokens and not batch.on_demand:
            self.expert_tokens.begin(batch.tokens)
        self._watch(worker.get_model())
        self.recorder.begin(batch)

    def _ended(self, _state: None, _result: Any, _worker: Any, *_args: Any, **_kwargs: Any) -> None:
        if not self.recorder.on:
            return
        counts = self.expert_tokens
        taken = None if counts is None or self._number % self._experts_every else counts.take()
        record = self.recorder.end()
        self._forget()
        if record is not None:
            record.expert_tokens = taken
            self._sender.send(record)

    def _forget(self) -> None:
        """Leave nothing of the step before, in which vLLM may have failed."""
        self.recorder.drop()
        if self.expert_tokens is not None and self.expert_tokens.on:
            self.expert_tokens.end()
        while self._watching:
            self._watching.pop().remove()

    def _watch(self, model: Any) -> None:
        """See the model's forward in this step, by torch's own hooks; without them, its other calls are faster."""
        if hasattr(model, "register_forward_pre_hook"):
            begins = partial(self._guard.run, "forward", self._forward_begins)
            ends = partial(self._guard.run, "forward", self._forward_ends)
            self._watching = [
                model.register_forward_pre_hook(begins, with_kwargs=True),
                model.register_forward_hook(ends),
            ]

    def _forward_begins(self, _model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        self.recorder.forward_begins(None if positions is None else int(positions.shape[-1]))

    def _forward_ends(self, *_args: Any) -> None:
        self.recorder.forward_ends()

    def _rearranging(self, _state: Any, is_profile: bool = False, *_args: Any, **_kwargs: Any) -> int | None:
        return None if is_profile else time.perf_counter_ns()

    def _rearranged(self, began: int | None, *_args: Any, **_kwargs: Any) -> None:
        if began is not None:  # vLLM's warm-up moves nothing
            self.recorder.rearranged(time.perf_counter_ns() - began)


def _logical_experts(router: Any) -> int:
    replicas = getattr(getattr(router, "eplb_state", None), "logical_replica_count", None)
    return int(router.global_num_experts) if replicas is None else int(replicas.shape[-1])


def install_steps(worker: Any, config: Any) -> None:
    """Wrap what this vLLM has of STEP_HOOKS, for the worker of this process; a second worker is left alone.

    They have a guard of their own: a fault in them takes away no request's spans.
    """
    guard = Guard("spans of steps")
    steps = step_worker(worker, config, guard)
    if steps is None:
        return
    hooks = [hook for hook in STEP_HOOKS if is_wanted(hook.name, config, on_cpu=worker.device.type == "cpu")]
    found, moved = check(tuple(hooks))
    if moved:
        logger.warning("llmtrace: steps lack: %s", "; ".join(sorted({hook.entry.path for hook in moved})))
    counts = steps.expert_tokens
    parts: list[tuple[Bodies, Switch | None]] = [(steps.step_bodies(), None), (steps.phase_bodies(), steps.recorder)]
    if counts is not None:
        parts.append((steps.expert_bodies(counts), counts))
    for bodies, switch in parts:
        for hook in hooks:
            if hook.name in found and hook.name in bodies:
                wrap(owner_of(hook), hook.function, guard, *bodies[hook.name], switch=switch)


def step_worker(worker: Any, config: Any, guard: Guard) -> StepWorker | None:
    """For a worker that has its device; None, with a line in the log, where its steps cannot be measured."""
    parallel = config.parallel_config
    if getattr(parallel, "use_ubatching", False):
        logger.warning("llmtrace: no spans of steps with micro-batches: their phases overlap")
        return None
    torch = importlib.import_module("torch")
    clock: Clock = HostClock() if worker.device.type == "cpu" else CudaClock(torch.cuda)
    rank = rank_of(worker, parallel, os.environ)
    endpoint = config.observability_config.otlp_traces_endpoint
    totals = Totals(rank.world, rank.ranks, rank.node)
    guard.run("the metrics of steps", lambda: totals.publish(meter()))
    sender = Sender(guard, clock, rank, BatchSpanProcessor(exporter(endpoint, os.environ)), totals)
    place = {names.WORLD_RANK: rank.world, names.NODE: rank.node}
    guard.run("the metric of drops", publish_steps, lambda: sender.dropped, place)
    counts = expert_tokens(torch, rank, config) if experts_every(os.environ) > 0 else None
    logger.info("llmtrace: 1 in %d steps of rank %d of %d is traced", every(os.environ), rank.world, rank.ranks)
    return StepWorker(Recorder(clock), sender, counts, guard)


def expert_tokens(torch: Any, rank: Rank, config: Any) -> ExpertTokens | None:
    """Of the tokens that a rank routes: tensor-parallel ranks route the same ones, or each a part of the batch."""
    most: int = config.scheduler_config.max_num_batched_tokens
    if getattr(config.parallel_config, "use_sequence_parallel_moe", False):
        # The batch is padded so that all parts are of one size.
        return ExpertTokens(torch, most + config.parallel_config.tensor_parallel_size - 1, rank.tp)
    return ExpertTokens(torch, most) if rank.tp == 0 else None


def rank_of(worker: Any, parallel: Any, environment: Mapping[str, str]) -> Rank:
    """Where a worker is among those that step together; numbered as vLLM numbers them, by data-parallel engine."""
    tp_size = int(parallel.tensor_parallel_size)
    tp = int(worker.rank) % tp_size
    dp = int(getattr(parallel, "data_parallel_rank", 0) or 0)
    return Rank(
        world=first_rank(parallel) + int(worker.rank),
        ranks=int(parallel.data_parallel_size) * int(parallel.world_size),
        dp=dp,
        tp=tp,
        ep=dp * tp_size + tp if parallel.enable_expert_parallel else None,
        node=node_name(environment),
        all2all=str(parallel.all2all_backend) if getattr(parallel, "all2all_backend", None) else None,
    )


def is_wanted(hook: str, config: Any, *, on_cpu: bool) -> bool:
    """Whether a hook of STEP_HOOKS is safe and useful here: where torch.compile takes its function apart, it is not."""
    compiled = bool(getattr(config.compilation_config, "mode", None))
    if compiled and (on_cpu or hook in EAGER_ONLY):
        return hook in ("execute_model", "execute_dummy_batch")
    return hook != "all_reduce" or int(config.parallel_config.tensor_parallel_size) > 1
