"""Collects each sampled request's facts in the engine core, beside the scheduler.

Runs between the steps of the engine's loop, so it is written to do next to nothing there: a look-up per output, a
little more in the steps in which a request is admitted, prefilled, preempted or ended. Nothing waits, nothing is sent
from here; the facts leave with vLLM's own messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtrace.engine import clock
from llmtrace.engine.facts import (
    DEPARTED_HEADER,
    FACTS_HEADER,
    FAILED,
    MAX_CHUNKS,
    MAX_STEPS,
    Facts,
    Preemption,
    is_sampled,
    to_wire,
)
from llmtrace.engine.loads import Loads, note_failure

if TYPE_CHECKING:
    from llmtrace.engine.steps.batch import Batches

_QUEUED, _SCHEDULED, _PREEMPTED = "QUEUED", "SCHEDULED", "PREEMPTED"


@dataclass(slots=True)
class _Tracked:
    request: Any
    facts: Facts


class Collector:
    """The facts of the requests in one scheduler. vLLM's objects are read, never written, save the last output's
    ``trace_headers``.
    """

    def __init__(self, scheduler: Any, batches: Batches | None = None) -> None:
        self._scheduler = scheduler
        self.batches = batches
        """Where steps are traced."""
        self._slow_s = float("inf") if batches is None else batches.demand.slow_s
        self._live: dict[str, _Tracked] = {}
        self._waiting: dict[str, _Tracked] = {}
        """Those not yet scheduled."""
        self._prefilling: dict[str, _Tracked] = {}
        self._preempted: dict[str, _Tracked] = {}
        self._departed: dict[str, _Tracked] = {}
        """Ended from outside; their facts leave with the next messages."""
        self._loads = Loads(scheduler)
        config = scheduler.vllm_config
        parallel = getattr(config, "parallel_config", None)
        self._dp_rank = int(getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0)) or 0)
        transfer = getattr(config, "kv_transfer_config", None)
        self._engine_id = str(getattr(transfer, "engine_id", None) or getattr(config, "instance_id", "") or "")

    def clear(self) -> None:
        """Let go of everything."""
        for tracked in (self._live, self._waiting, self._prefilling, self._preempted, self._departed):
            tracked.clear()
        self._loads.clear()

    def clear_steps(self) -> None:
        """Let go of what steps are traced for."""
        if self.batches is not None:
            self.batches.demand.forget()

    def waiting_count(self, request: Any) -> int | None:
        """Requests waiting now, before ``request`` joins; None where it is not sampled or is known already."""
        if not is_sampled(request.trace_headers) or request.request_id in self._live:
            return None
        counts = getattr(self._scheduler, "get_request_counts", None)
        return int(counts()[1]) if counts is not None else -1

    def added(self, request: Any, position: int | None) -> None:
        """``request`` is in the queue; ``position`` as :meth:`waiting_count` said."""
        if position is None:
            return
        facts = Facts(
            queued=_stamp(request, _QUEUED, time.monotonic()),
            arrival_ns=round((getattr(request, "arrival_time", None) or 0.0) * clock.NS_PER_S),
            engine_id=self._engine_id,
            dp_rank=self._dp_rank,
            position=position if position >= 0 else None,
            prompt_tokens=request.num_prompt_tokens,
            structured_output=bool(getattr(request, "use_structured_output", False)),
            lora=getattr(getattr(request, "lora_request", None), "lora_name", None),
        )
        remote = (getattr(request, "kv_transfer_params", None) or {}).get("remote_engine_id")
        facts.remote_engine_id = remote if isinstance(remote, str) else None
        tracked = _Tracked(request, facts)
        self._live[request.request_id] = self._waiting[request.request_id] = tracked
        if request.is_finished():  # a request that is only there to be aborted
            self._depart(request.request_id)

    def scheduled(self, output: Any, began: float) -> None:
        """A step was scheduled; ``began`` is when (monotonic s)."""
        traced = () if self.batches is None else self.batches.scheduled(output)
        if not self._live:
            return
        for gone in output.finished_req_ids:
            if gone in self._live:
                self._forget(gone)
        preempted = getattr(output, "preempted_req_ids", None)
        if preempted:
            self._note_preempted(preempted, began)
        tokens = output.num_scheduled_tokens
        if self._preempted:
            self._note_resumed(tokens, began)
        if self._waiting:
            self._note_new(output, began)
        if traced and self.batches is not None:
            self.batches.guard.run("noting the requests of a step", self._note_step, self.batches, traced)
        if self._prefilling:
            self._note_chunks(tokens, output.total_num_scheduled_tokens, began)

    def stepped(self, scheduler_output: Any, model_output: Any) -> None:
        """The model ran; called before the scheduler takes its output in."""
        if not self._live:
            return
        drafts = getattr(scheduler_output, "scheduled_spec_decode_tokens", None)
        if drafts:
            self._note_drafts(drafts, getattr(scheduler_output, "num_invalid_spec_tokens", None) or {}, model_output)
        connector = getattr(model_output, "kv_connector_output", None)
        received = getattr(connector, "finished_recving", None)
        if received and self._waiting:
            for request_id in received:
                if (tracked := self._waiting.get(request_id)) is not None:
                    self._loads.received(request_id, tracked.facts, received, connector)

    def updated(self, messages: dict[int, Any]) -> None:
        """``messages`` (by API server) are about to leave: count their tokens, and put finished requests' facts in."""
        if not self._live and not self._departed:
            return
        self._loads.updated()
        live = self._live
        for message in messages.values():
            now = message.timestamp
            for output in message.outputs:
                tracked = live.get(output.request_id)
                if tracked is None:
                    if output.request_id in self._departed:
                        self._attach(output, self._departed.pop(output.request_id))
                    continue
                count = len(output.new_token_ids)
                if count:
                    # Written out: this runs for every token of every sampled request.
                    facts = tracked.facts
                    if facts.last_token is None:
                        facts.first_token = now
                    elif now - facts.last_token > facts.worst_gap:
                        facts.worst_gap = now - facts.last_token
                        if facts.worst_gap > self._slow_s:
                            self._ask(tracked, facts.decode_on_demand)
                    facts.last_token = now
                    facts.output_tokens += count
                if output.finish_reason is not None and tracked.request.is_finished():
                    self._end(tracked, now)
                    self._forget(output.request_id)
                    self._attach(output, tracked)
        if self._departed:
            self._send_departed(messages)

    def ended(self, request_ids: str | Iterable[str] | None) -> None:
        """These requests (None: all) were to be ended from outside."""
        if not self._live:
            return
        if request_ids is None:
            ids = list(self._live)
        elif isinstance(request_ids, str):
            ids = [request_ids]
        else:
            ids = list(request_ids)
        for request_id in ids:
            tracked = self._live.get(request_id)
            if tracked is not None and tracked.request.is_finished():
                self._depart(request_id)

    def _depart(self, request_id: str) -> None:
        tracked = self._live[request_id]
        self._end(tracked, time.monotonic())
        self._forget(request_id)
        self._departed[request_id] = tracked

    def _end(self, tracked: _Tracked, now: float) -> None:
        facts, request = tracked.facts, tracked.request
        facts.finished = now
        facts.finish_reason = str(request.get_finished_reason())
        if facts.loads and facts.scheduled is None and facts.finish_reason == FAILED:
            # kv_load_failure_policy "fail": the load was the end of it.
            facts.loads[-1].failed, facts.loads[-1].end = True, now
        facts.offset_ns = clock.offset_ns()
        held = min(getattr(request, "num_computed_tokens", 0), getattr(request, "num_tokens", 0))
        block_size = getattr(self._scheduler, "block_size", 0)
        if block_size and request.request_id not in self._preempted:
            facts.kv_blocks = -(-held // block_size)

    def _forget(self, request_id: str) -> None:
        for tracked in (self._live, self._waiting, self._prefilling, self._preempted):
            tracked.pop(request_id, None)

    def _attach(self, output: Any, tracked: _Tracked, **extra: str) -> None:
        headers: Mapping[str, str] = tracked.request.trace_headers
        output.trace_headers = {**headers, FACTS_HEADER: to_wire(tracked.facts), **extra}

    def _send_departed(self, messages: dict[int, Any]) -> None:
        """Add an output for each request that ended without one; the API server's side takes it out again."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        for request_id, tracked in self._departed.items():
            output = EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ABORT)
            self._attach(output, tracked, **{DEPARTED_HEADER: "1"})
            client = tracked.request.client_index
            if client in messages:
                # Not append: where a message has no outputs, its list may be the class's default.
                messages[client].outputs = [*messages[client].outputs, output]
            else:
                messages[client] = EngineCoreOutputs(outputs=[output])
        self._departed.clear()

    def _note_new(self, output: Any, began: float) -> None:
        tokens = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            tracked = self._waiting.pop(new.req_id, None)
            if tracked is not None:
                self._note_admitted(tracked, began, tokens[new.req_id])
                if self.batches is not None and self.batches.guard.on:
                    self.batches.demand.admitted(tracked.request)
                self._prefilling[new.req_id] = tracked
        if self._loads.possible:
            now = time.monotonic()
            for tracked in self._waiting.values():
                self._loads.scheduled(tracked.request, tracked.facts, now)

    def _note_admitted(self, tracked: _Tracked, began: float, tokens: int) -> None:
        facts, request = tracked.facts, tracked.request
        facts.scheduled = _stamp(request, _SCHEDULED, began)
        scheduler = self._scheduler
        counts = getattr(scheduler, "get_request_counts", None)
        if counts is not None:
            facts.running, facts.waiting = counts()
        usage = getattr(scheduler, "get_kv_cache_usage", None)
        if usage is not None:
            facts.kv_usage = float(usage())
        stats = getattr(request, "prefill_stats", None)
        if stats is not None:
            facts.computed_tokens = getattr(stats, "num_computed_tokens", None)
            facts.local_cached_tokens = getattr(stats, "num_local_cached_tokens", None)
            facts.external_cached_tokens = getattr(stats, "num_external_cached_tokens", None)
        note_failure(request, facts, tokens)

    def _note_chunks(self, tokens: Mapping[str, int], total: int, began: float) -> None:
        for request_id, tracked in list(self._prefilling.items()):
            count = tokens.get(request_id)
            if count is None:
                continue
            facts = tracked.facts
            facts.chunk_count += 1
            if len(facts.chunks) < MAX_CHUNKS:
                # vLLM stamps the admission a little after the step began; the chunk is not before it.
                facts.chunks.append((max(began, _newest_start(facts)), count, len(tokens) - 1, total - count))
            # With asynchronous scheduling the next step, a decode, is scheduled before the first token is known.
            if not getattr(tracked.request, "is_prefill_chunk", False):
                del self._prefilling[request_id]
            elif facts.scheduled is not None and began - facts.scheduled > self._slow_s:
                self._ask(tracked, facts.prefill_on_demand)

    def _ask(self, tracked: _Tracked, linked: list[int]) -> None:
        """Have steps traced for a slow request, unless it had as many as it links to."""
        if self.batches is not None and self.batches.guard.on and len(linked) < MAX_STEPS:
            self.batches.demand.ask(tracked.request)

    def _note_step(self, batches: Batches, request_ids: Iterable[str]) -> None:
        on_demand = batches.on_demand
        for request_id in request_ids:
            tracked = self._live.get(request_id)
            if tracked is None:
                continue
            facts = tracked.facts
            facts.step_group, facts.step_rank = batches.group, batches.rank
            prefills = facts.first_token is None and request_id in self._prefilling
            if on_demand:
                steps = facts.prefill_on_demand if prefills else facts.decode_on_demand
            else:
                steps = facts.prefill_steps if prefills else facts.decode_steps
            if len(steps) < MAX_STEPS:
                steps.append(batches.number)

    def _note_preempted(self, preempted: Iterable[str], began: float) -> None:
        for request_id in preempted:
            tracked = self._live.get(request_id)
            if tracked is not None:
                tracked.facts.preemptions.append(Preemption(_stamp(tracked.request, _PREEMPTED, began)))
                self._prefilling.pop(request_id, None)
                self._preempted[request_id] = tracked

    def _note_resumed(self, tokens: Mapping[str, int], began: float) -> None:
        for request_id in [request_id for request_id in self._preempted if request_id in tokens]:
            tracked = self._preempted.pop(request_id)
            tracked.facts.preemptions[-1].resumed = _stamp(tracked.request, _SCHEDULED, began)
            self._prefilling[request_id] = tracked

    def _note_drafts(self, drafts: Mapping[str, list[int]], invalid: Mapping[str, int], model_output: Any) -> None:
        sampled = getattr(model_output, "sampled_token_ids", None)
        indices = getattr(model_output, "req_id_to_index", None)
        if not sampled or not indices:
            return
        for request_id, tokens in drafts.items():
            tracked = self._live.get(request_id)
            if tracked is not None and request_id in indices and (got := len(sampled[indices[request_id]])):
                tracked.facts.draft_tokens += len(tokens) - invalid.get(request_id, 0)
                tracked.facts.accepted_tokens += got - 1


def _newest_start(facts: Facts) -> float:
    resumed = facts.preemptions[-1].resumed if facts.preemptions else None
    return resumed or facts.scheduled or 0.0


def _stamp(request: Any, kind: str, otherwise: float) -> float:
    """vLLM's own time of its newest event of this kind, if it keeps them (``--disable-log-stats`` does not)."""
    for event in reversed(getattr(request, "events", ())):
        if event.type.name == kind:
            return float(event.timestamp)
    return otherwise
