"""The worker's side: begins and ends the steps, and marks the phases where vLLM does them."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmtrace.engine.compat import STEP_HOOKS, check, owner_of
from llmtrace.engine.drops import publish_steps
from llmtrace.engine.hooks import After, Before, Guard, logger, wrap
from llmtrace.engine.meters import meter
from llmtrace.engine.steps.batch import Batch, batch_of, first_rank
from llmtrace.engine.steps.clocks import Clock, CudaClock, HostClock
from llmtrace.engine.steps.demand import heard
from llmtrace.engine.steps.experts import ExpertTokens
from llmtrace.engine.steps.ids import GROUP_VARIABLE, every, experts_every
from llmtrace.engine.steps.recorder import COMBINE, DISPATCH, EXPERTS, WAIT, Recorder
from llmtrace.engine.steps.sender import Rank, Sender, exporter, node_name
from llmtrace.engine.steps.totals import Totals
from llmtrace.semconv import attributes as names

Bodies = dict[str, tuple[Before | None, After | None]]
EAGER_ONLY = ("reduce_final_output", "all_reduce")
"""Hooks inside of what torch.compile takes apart: they exist only where nothing is compiled."""


class StepWorker:
    """One worker's steps. Its bodies run under the guard, with the wrapped function's own arguments."""

    def __init__(self, recorder: Recorder, sender: Sender, expert_tokens: ExpertTokens | None) -> None:
        self.recorder = recorder
        self._sender = sender
        self._expert_tokens = expert_tokens
        environment = os.environ
        self._every = every(environment)
        self._experts_every = experts_every(environment)
        self._environment = environment
        self._group = ""
        self._number = 0
        self._heard = heard
        self._watched: Any = None

    def step_bodies(self) -> Bodies:
        """Of the hooks that run in every step, and between steps."""
        return {
            "execute_model": (self._beginning, self._ended),
            "execute_dummy_batch": (self._beginning_dummy, self._ended),
            "eplb_mapping": (self._routed, None),
            "rearrange": (self._rearranging, self._rearranged),
        }

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
        batch = batch_of(scheduler_output)
        self.recorder.drop()
        if batch is None:
            return
        self._group, self._number = batch.group, batch.number
        if self._expert_tokens is not None:
            self._expert_tokens.begin(scheduler_output.total_num_scheduled_tokens)
        if batch.traced:
            self._begin(worker, batch)

    def _beginning_dummy(self, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        self._number += 1
        self.recorder.drop()
        self._group = self._group or self._heard.group or self._environment.get(GROUP_VARIABLE, "")
        on_demand = self._number % self._every != 0
        if self._group and (not on_demand or self._number in self._heard.window):
            self._begin(worker, Batch(self._group, self._number, traced=True, dummy=True, on_demand=on_demand))

    def _begin(self, worker: Any, batch: Batch) -> None:
        self._watch(worker)
        self.recorder.begin(batch)

    def _ended(self, _state: None, _result: Any, _worker: Any, *_args: Any, **_kwargs: Any) -> None:
        if self._expert_tokens is not None:
            self._expert_tokens.end()
        if not self.recorder.on:
            return
        counts = self._expert_tokens
        taken = None if counts is None or self._number % self._experts_every else counts.take()
        record = self.recorder.end()
        if record is not None:
            record.expert_tokens = taken
            self._sender.send(record)

    def _watch(self, worker: Any) -> None:
        """See the model's forward, by torch's own hooks."""
        model = worker.get_model()
        if model is self._watched or not hasattr(model, "register_forward_pre_hook"):
            return
        self._watched = model
        model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
        model.register_forward_hook(self._forward_ends)

    def _forward_begins(self, _model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.recorder.on:
            positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
            self.recorder.forward_begins(None if positions is None else int(positions.shape[-1]))

    def _forward_ends(self, *_args: Any) -> None:
        if self.recorder.on:
            self.recorder.forward_ends()

    def _routed(self, router: Any, topk_ids: Any, *_args: Any, **_kwargs: Any) -> None:
        if self._expert_tokens is not None:
            self._expert_tokens.count(topk_ids, _logical_experts(router))

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
    guard = Guard()
    steps = step_worker(worker, config, guard)
    if steps is None:
        return
    hooks = [hook for hook in STEP_HOOKS if is_wanted(hook.name, config, on_cpu=worker.device.type == "cpu")]
    found, moved = check(tuple(hooks))
    if moved:
        logger.warning("llmtrace: steps lack: %s", "; ".join(sorted({hook.entry.path for hook in moved})))
    every_step, in_traced = steps.step_bodies(), steps.phase_bodies()
    for hook in hooks:
        if hook.name not in found:
            continue
        if hook.name in every_step:
            wrap(owner_of(hook), hook.function, guard, *every_step[hook.name])
        else:
            wrap(owner_of(hook), hook.function, guard, *in_traced[hook.name], switch=steps.recorder)


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
    # Tensor-parallel ranks route the same tokens.
    told = rank.tp == 0 and experts_every(os.environ) > 0
    counts = ExpertTokens(torch, config.scheduler_config.max_num_batched_tokens) if told else None
    logger.info("llmtrace: 1 in %d steps of rank %d of %d is traced", every(os.environ), rank.world, rank.ranks)
    return StepWorker(Recorder(clock), sender, counts)


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
