"""Times the plugin's code inside vLLM, on vLLM's own scheduler and output processor, without a model between them.

Run with the environment of the model servers and the plugin importable, because it builds vLLM's objects::

    PYTHONPATH=PLUGIN PYTHON steps.py MODEL_FOLDER http://127.0.0.1:COLLECTOR_PORT

Prints one JSON object. Every call of the plugin goes through ``Guard.run``, which is what is timed. Requests go from
the scheduler through vLLM's own encoding to the output processor, and their spans through vLLM's exporter to the
collector; only the model's answer is made up: it has no part in what is timed. Microseconds throughout.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tracing import init_tracer
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager

from llmtrace.engine import frontend, plugin
from llmtrace.engine.hooks import Guard

RUNNING = (1, 32, 256)
LIVES = 10
REQUESTS = 64
"""At least, for each number of running requests and each mode."""
BLOCK_SIZE = 32
BLOCKS = 8192
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
TOKEN = 5
SPANS_TIMEOUT_S = 30
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
ENGINE, API_SERVER, SPANS, OWN, EXPORT, START = "engine core", "API server", "spans", "own", "export", "start"
PLACES = {"Scheduler": ENGINE, "OutputProcessor": API_SERVER, "making spans": SPANS}
"""By the first part of the name under which the plugin's code is run."""
US = 1e6


class Clock:
    """What was spent in seconds, and the calls, by place."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        """For the medians of short steps."""
        self.cpu: dict[str, float] = defaultdict(float)
        """Of the thread: for sums, which must not have other processes' turns in them."""
        self.calls: dict[str, int] = defaultdict(int)
        self.guards: list[Guard] = []

    def time(self, place: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.wall[place] += time.perf_counter() - wall
            self.cpu[place] += time.thread_time() - cpu
            self.calls[place] += 1

    def attach(self) -> None:
        """Time every call of the plugin, vLLM's making of ``llm_request``, and the exporter."""
        run, do_tracing, export = Guard.run, OutputProcessor.do_tracing, OTLPSpanExporter.export

        def timed_run(guard: Guard, where: str, *args: Any, **kwargs: Any) -> Any:
            self.guards = [guard]
            place = PLACES.get(where.partition(".")[0], START)
            if where.startswith("SpanProcessor") and threading.current_thread() is threading.main_thread():
                place = API_SERVER  # In the other thread it is part of making the spans.
            return self.time(place, run, guard, where, *args, **kwargs)

        @functools.wraps(do_tracing)
        def timed_tracing(*args: Any) -> None:
            self.time(OWN, do_tracing, *args)

        Guard.run = timed_run  # type: ignore[method-assign]
        OutputProcessor.do_tracing = timed_tracing
        OTLPSpanExporter.export = lambda *args: self.time(EXPORT, export, *args)  # type: ignore[method-assign]
        plugin.install()


@dataclass
class Lives:
    """What a number of requests took that ran together from the first token to the last, several times over."""

    requests: int = 0
    scheduler: list[float] = field(default_factory=list)
    """CPU seconds of each step in which all decode, the plugin's included."""
    engine: list[float] = field(default_factory=list)
    """Seconds that the plugin took of it."""
    api_server: list[float] = field(default_factory=list)
    """Seconds that it took in the output processor."""
    rest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """CPU seconds outside of these steps, by place."""

    def step(self, values: list[float]) -> float:
        return round(statistics.median(values) * US, 2)

    def request(self, place: str) -> float:
        return round(self.rest[place] / self.requests * US, 1)


class Engine:
    """vLLM's scheduler and output processor, back to back."""

    def __init__(self, model: str, clock: Clock) -> None:
        self._clock = clock
        self._config = EngineArgs(model=model, block_size=BLOCK_SIZE, max_num_seqs=max(RUNNING)).create_engine_config()
        self._config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.bfloat16)
        self.scheduler = self._config.scheduler_config.get_scheduler_cls()(
            vllm_config=self._config,
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(self._config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._processor = OutputProcessor(None, log_stats=True, tracing_enabled=True)
        self._encoder, self._decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self._number = 0

    def live(self, count: int, flag: str, lives: Lives) -> None:
        """Run ``count`` requests from start to end, whose ``traceparent`` has ``flag``."""
        for _ in range(count):
            self._add(flag)
        while self.scheduler.has_unfinished_requests():
            self._step(count, lives)
        lives.requests += count

    def _add(self, flag: str) -> None:
        self._number += 1
        external = f"cmpl-{self._number:032x}-0"
        asked = EngineCoreRequest(
            request_id=f"{external}-0123abcd",
            prompt_token_ids=[self._number % 200 + i % 50 for i in range(PROMPT_TOKENS)],
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=str(self._number),
            data_parallel_rank=None,
            trace_headers={"traceparent": TRACE + flag},
            external_req_id=external,
        )
        self._processor.add_request(
            asked, None, queue=RequestOutputCollector(RequestOutputKind.DELTA, asked.request_id)
        )
        self.scheduler.add_request(Request.from_engine_core_request(asked, self._hasher))

    def _step(self, count: int, lives: Lives) -> None:
        engine, api_server, rest = self._clock.wall[ENGINE], self._clock.wall[API_SERVER], dict(self._clock.cpu)
        began = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        answer = self._answer(output)
        answered = time.thread_time()
        messages = self.scheduler.update_from_output(output, answer)
        seconds = time.thread_time() - answered + scheduled - began
        ended = False
        for message in messages.values():
            received = self._decoder.decode(self._encoder.encode(message))
            ended |= any(each.finished for each in received.outputs)
            self._processor.process_outputs(received.outputs, received.timestamp, IterationStats())
        if not ended and not output.scheduled_new_reqs and output.total_num_scheduled_tokens == count:
            lives.scheduler.append(seconds)
            lives.engine.append(self._clock.wall[ENGINE] - engine)
            lives.api_server.append(self._clock.wall[API_SERVER] - api_server)
            self._clock.cpu[ENGINE], self._clock.cpu[API_SERVER] = rest.get(ENGINE, 0.0), rest.get(API_SERVER, 0.0)

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        tokens = [[] if self.scheduler.requests[each].is_prefill_chunk else [TOKEN] for each in ids]
        return ModelRunnerOutput(ids, {each: i for i, each in enumerate(ids)}, tokens)


def settle(clock: Clock, jobs: int, lives: Lives) -> None:
    """Wait until the spans of ``jobs`` requests are made and all spans are exported."""
    deadline = time.monotonic() + SPANS_TIMEOUT_S
    while clock.calls[SPANS] < jobs:
        if time.monotonic() > deadline:
            sys.exit(f"the spans of {jobs} requests were not made within {SPANS_TIMEOUT_S} s")
        time.sleep(0.01)
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
    lives.rest.update(clock.cpu)


def measure(engine: Engine, clock: Clock, count: int, flag: str) -> Lives:
    lives = Lives()
    repeats = max(LIVES, REQUESTS // count)
    with_spans = flag == "01" and all(guard.on for guard in clock.guards)
    for number in range(-2, repeats):
        if number == 0:
            lives = Lives()
            clock.cpu.clear()
        clock.calls.clear()
        engine.live(count, flag, lives)
        settle(clock, count if with_spans else 0, lives)
    return lives


def main() -> None:
    model, endpoint = sys.argv[1:]
    init_tracer("vllm.llm_engine", endpoint)
    clock = Clock()
    clock.attach()
    engine = Engine(model, clock)
    gc.collect()
    gc.freeze()  # as vLLM's engine core does when it is ready
    found: dict[int, dict[str, float]] = {}
    frontend.PAUSE_S = 0.0  # All requests end together here, and nobody wants to wait.
    for count in RUNNING:
        unsampled, sampled = measure(engine, clock, count, "00"), measure(engine, clock, count, "01")
        found[count] = {
            "scheduler": unsampled.step(unsampled.scheduler) - unsampled.step(unsampled.engine),
            "step_unsampled": unsampled.step(unsampled.engine),
            "step": sampled.step(sampled.engine),
            "api_step": sampled.step(sampled.api_server),
            "request": sampled.request(ENGINE),
            "api_request": sampled.request(API_SERVER),
            "spans_request": sampled.request(SPANS),
            "export_request": sampled.request(EXPORT),
        }
    for guard in clock.guards:
        if not guard.on:
            sys.exit("the plugin has switched itself off")
        guard.on = False
    for count, numbers in found.items():
        own = measure(engine, clock, count, "01")
        numbers["own_request"] = own.request(OWN)
        numbers["own_export_request"] = own.request(EXPORT)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
