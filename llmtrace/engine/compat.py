"""Everything that this plugin takes for granted about vLLM, in one table, and the check of it.

vLLM's internals move between versions. Each function that is wrapped and each name that is read stands here with what
is used of it, why this one was chosen, and what is lost without it; nothing else of vLLM is touched. ``check`` compares
the functions with the vLLM at hand when the plugin is loaded; :mod:`llmtrace.engine.source` compares all of it with a
vLLM's source, for the contract test and for a release that is not in CHECKED_VERSIONS.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

CHECKED_VERSIONS = ("0.32", "0.33")
"""vLLM releases (major.minor) whose source has everything in this table; 0.32 is also run."""


@dataclass(frozen=True)
class Hook:
    """A function of vLLM that is wrapped: a method of ``owner``, or, with none, one of the module.

    ``parameters`` are those used, by name and in this order after ``self``; others may come and go.
    """

    name: str
    module: str
    owner: str
    function: str
    parameters: tuple[str, ...]
    reason: str
    without: str
    """What the traces lack if it is gone."""

    @property
    def path(self) -> str:
        """How people name it."""
        return ".".join(part for part in (self.module, self.owner, self.function) if part)


@dataclass(frozen=True)
class Name:
    """An attribute of vLLM's objects that is read, and what for.

    ``optional``: without it only that is missing.
    """

    module: str
    owner: str
    attribute: str
    reason: str
    optional: bool = False

    @property
    def path(self) -> str:
        """How people name it."""
        return f"{self.module}.{self.owner}.{self.attribute}"

    @property
    def without(self) -> str:
        """What the traces lack if it is gone."""
        return self.reason if self.optional else f"every span of the engine ({self.reason})"


@dataclass(frozen=True)
class Moved:
    """Something of the table that this vLLM does not have."""

    entry: Hook | Name
    what: str


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_OUTPUT_PROCESSOR = "vllm.v1.engine.output_processor"
_ENGINE_CORE = "vllm.v1.engine.core"
_WORKER = "vllm.v1.worker.gpu_worker"
_MODULAR_KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"
_BASE_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"
_NIXL_STATS = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats"

HOOKS = (
    Hook(
        "add_request",
        _SCHEDULER,
        "Scheduler",
        "add_request",
        ("request",),
        "Public interface of every scheduler (SchedulerInterface). The one door by which a request, each of n and each "
        "of a list of prompts, comes into an engine; before it the request is not known here, after it it is queued.",
        "every span of the engine",
    ),
    Hook(
        "schedule",
        _SCHEDULER,
        "Scheduler",
        "schedule",
        (),
        "Public interface. Returns the SchedulerOutput that every model runner reads: who runs, with how many tokens, "
        "who is new, who was preempted. One call a step, so nothing has to be hooked inside its loop, which changes "
        "with every release.",
        "every span of the engine",
    ),
    Hook(
        "update_from_output",
        _SCHEDULER,
        "Scheduler",
        "update_from_output",
        ("scheduler_output", "model_runner_output"),
        "Public interface. Returns the messages to the API servers, with vLLM's own time stamp of each token, and is "
        "the last place in the engine core where something can be added to them; called once more after an abort, "
        "because the workers must hear of it.",
        "every span of the engine",
    ),
    Hook(
        "finish_requests",
        _SCHEDULER,
        "Scheduler",
        "finish_requests",
        ("request_ids",),
        "Public interface. Every end from outside comes through it: the client hung up, a stop string was found by the "
        "API server, a pause, a shutdown. vLLM sends no message about those.",
        "the spans of aborted requests and of those that a stop string ended",
    ),
    Hook(
        "do_tracing",
        _OUTPUT_PROCESSOR,
        "OutputProcessor",
        "do_tracing",
        ("engine_core_output", "req_state"),
        "Makes llm_request, in the API server, when the request is over. During it an OpenTelemetry SpanProcessor "
        "(public API) sees the span start, so that its id is known without choosing it and without touching vLLM's "
        "tracing helpers. It is called once per request, whichever API server has it.",
        "every span of the engine",
    ),
    Hook(
        "process_outputs",
        _OUTPUT_PROCESSOR,
        "OutputProcessor",
        "process_outputs",
        ("engine_core_outputs",),
        "The first to see the engine core's messages in the API server. Takes out those that this plugin added for "
        "requests which left without one: vLLM would ignore them, but need not be trusted to.",
        "the spans of aborted requests and of those that a stop string ended",
    ),
    Hook(
        "create_engine_config",
        "vllm.engine.arg_utils",
        "EngineArgs",
        "create_engine_config",
        (),
        "Public. Its result carries observability_config.otlp_traces_endpoint to every process: setting it there from "
        "the OTEL_* variables is the same as the flag on the command line.",
        "switching on by OTEL_* variables alone; --otlp-traces-endpoint still does",
    ),
    Hook(
        "engine_loop",
        _ENGINE_CORE,
        "DPEngineCoreProc",
        "run_busy_loop",
        (),
        "Called once, when all of an engine core is there and no request yet; only those have it that step together "
        "with others. They share a store, in which the group of ranks agrees on its name without waiting.",
        "spans of steps with data parallelism",
    ),
    Hook(
        "engine_dummy_batch",
        _ENGINE_CORE,
        "EngineCore",
        "execute_dummy_batch",
        (),
        "A forward pass without requests, because other data-parallel ranks have some. Counted, so that a step has the "
        "same number on all ranks; only engines of mixture-of-experts models call it.",
        "steps with the same number on all ranks",
    ),
    Hook(
        "init_device",
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase",
        "init_device",
        (),
        "Runs once in each worker's process, when its ranks and device are known and no model is loaded. Only if the "
        "model has experts are the functions of STEP_HOOKS looked for, imported and wrapped.",
        "spans of steps",
    ),
)

STEP_HOOKS = (
    Hook(
        "execute_model",
        _WORKER,
        "Worker",
        "execute_model",
        ("scheduler_output",),
        "A forward pass of one rank, on CUDA and on CPUs, with what its engine says of it. vLLM's warm-up calls it "
        "without that.",
        "spans of steps",
    ),
    Hook(
        "execute_dummy_batch",
        _WORKER,
        "Worker",
        "execute_dummy_batch",
        (),
        "A forward pass without requests.",
        "spans of dummy steps",
    ),
    Hook(
        "prepare",
        _MODULAR_KERNEL,
        "FusedMoEKernelModularImpl",
        "_prepare",
        (),
        "Quantising and dispatch, of every all-to-all back end; with overlapping ones, until the tokens are there.",
        "the phases of steps",
    ),
    Hook(
        "fused_experts",
        _MODULAR_KERNEL,
        "FusedMoEKernelModularImpl",
        "_fused_experts",
        (),
        "The rank's experts, of every kernel.",
        "the phases of steps",
    ),
    Hook(
        "finalize",
        _MODULAR_KERNEL,
        "FusedMoEKernelModularImpl",
        "_finalize",
        (),
        "Combine, of every all-to-all back end.",
        "the phases of steps",
    ),
    Hook(
        "reduce_final_output",
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "MoERunner",
        "_maybe_reduce_final_output",
        (),
        "Combine where experts are spread over tensor-parallel ranks alone: an all-reduce after the layer.",
        "the all-reduce after a layer, which then counts as waiting",
    ),
    Hook(
        "all_reduce",
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        "all_reduce",
        (),
        "What tensor-parallel ranks wait for outside of MoE layers. Left alone with one tensor-parallel rank.",
        "waiting in tensor-parallel all-reduces, which then counts as attention",
    ),
    Hook(
        "dp_sync",
        "vllm.v1.worker.dp_utils",
        "",
        "_run_ar",
        (),
        "Where data-parallel ranks agree on the size of the step, and so wait for the last one.",
        "waiting for the step's size",
    ),
    Hook(
        "dp_sync_v2",
        "vllm.v1.worker.gpu.dp_utils",
        "",
        "sync_cudagraph_and_dp_padding",
        (),
        "The same in vLLM's second model runner.",
        "waiting for the step's size",
    ),
    Hook(
        "eplb_mapping",
        _BASE_ROUTER,
        "BaseRouter",
        "_apply_eplb_mapping",
        ("topk_ids",),
        "Has the logical experts of the rank's own tokens, of every router, before replicas and other ranks' tokens.",
        "tokens per expert",
    ),
    Hook(
        "rearrange",
        "vllm.distributed.eplb.eplb_state",
        "EplbState",
        "rearrange",
        (),
        "Experts move to other ranks (EPLB): when the tokens of a step are sampled, and in a pass without requests.",
        "rearrangements of experts",
    ),
)
"""Wrapped only in the workers of mixture-of-experts models whose steps are traced."""

NAMES = (
    Name("vllm.v1.request", "Request", "request_id", "key of everything"),
    Name("vllm.v1.request", "Request", "trace_headers", "whether the request is sampled"),
    Name("vllm.v1.request", "Request", "client_index", "which API server has it"),
    Name("vllm.v1.request", "Request", "is_finished", "a turn of a streamed input ends, the request does not"),
    Name("vllm.v1.request", "Request", "get_finished_reason", "how it ended"),
    Name("vllm.v1.request", "Request", "num_prompt_tokens", "prompt tokens"),
    Name("vllm.v1.request", "Request", "is_prefill_chunk", "whether the chunk just scheduled was the last one", True),
    Name("vllm.v1.request", "Request", "arrival_time", "start of an aborted llm_request", True),
    Name("vllm.v1.request", "Request", "status", "whether it waits for remote KV", True),
    Name("vllm.v1.request", "Request", "events", "vLLM's own time stamps, so that its numbers and ours agree", True),
    Name("vllm.v1.request", "Request", "prefill_stats", "tokens cached and computed", True),
    Name("vllm.v1.request", "Request", "num_tokens", "KV blocks held", True),
    Name("vllm.v1.request", "Request", "num_computed_tokens", "KV blocks held", True),
    Name("vllm.v1.request", "Request", "lora_request", "LoRA adapter", True),
    Name("vllm.v1.request", "Request", "use_structured_output", "structured output", True),
    Name("vllm.v1.request", "Request", "kv_transfer_params", "the engine that prefilled", True),
    Name("vllm.v1.request", "RequestStatus", "WAITING_FOR_REMOTE_KVS", "whether it waits for remote KV", True),
    Name("vllm.v1.metrics.stats", "PrefillStats", "num_computed_tokens", "tokens computed", True),
    Name("vllm.v1.metrics.stats", "PrefillStats", "num_local_cached_tokens", "tokens cached here", True),
    Name("vllm.v1.metrics.stats", "PrefillStats", "num_external_cached_tokens", "tokens cached elsewhere", True),
    Name("vllm.v1.engine", "EngineCoreEventType", "QUEUED", "vLLM's time stamp", True),
    Name("vllm.v1.engine", "EngineCoreEventType", "SCHEDULED", "vLLM's time stamp", True),
    Name("vllm.v1.engine", "EngineCoreEventType", "PREEMPTED", "vLLM's time stamp", True),
    Name("vllm.v1.engine", "EngineCoreEvent", "type", "vLLM's time stamp", True),
    Name("vllm.v1.engine", "EngineCoreEvent", "timestamp", "vLLM's time stamp", True),
    Name("vllm.v1.engine", "EngineCoreOutput", "request_id", "key of everything"),
    Name("vllm.v1.engine", "EngineCoreOutput", "new_token_ids", "how many tokens; never which"),
    Name("vllm.v1.engine", "EngineCoreOutput", "finish_reason", "whether it is the last output"),
    Name("vllm.v1.engine", "EngineCoreOutput", "trace_headers", "carries the facts"),
    Name("vllm.v1.engine", "EngineCoreOutputs", "outputs", "messages of a step"),
    Name("vllm.v1.engine", "EngineCoreOutputs", "timestamp", "vLLM's time stamp of the tokens of a step"),
    Name("vllm.v1.engine", "FinishReason", "ABORT", "an output for a request that left without one"),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "scheduled_new_reqs", "who was scheduled for the first time"),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "num_scheduled_tokens", "chunks and their batch"),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "total_num_scheduled_tokens", "tokens of the batch"),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "finished_req_ids", "who is gone for certain"),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "preempted_req_ids", "preemptions", True),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "scheduled_spec_decode_tokens", "drafts", True),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", "num_invalid_spec_tokens", "drafts refused by grammar", True),
    Name("vllm.v1.core.sched.output", "NewRequestData", "req_id", "who was scheduled for the first time"),
    Name("vllm.v1.outputs", "ModelRunnerOutput", "kv_connector_output", "end of a KV load", True),
    Name("vllm.v1.outputs", "ModelRunnerOutput", "sampled_token_ids", "drafts accepted", True),
    Name("vllm.v1.outputs", "ModelRunnerOutput", "req_id_to_index", "drafts accepted", True),
    Name("vllm.v1.outputs", "KVConnectorOutput", "finished_recving", "end of a KV load", True),
    Name("vllm.v1.outputs", "KVConnectorOutput", "kv_connector_stats", "NIXL's own time for a load", True),
    Name(_NIXL_STATS, "NixlKVConnectorStats", "data", "NIXL's own time for a load; a mapping of lists", True),
    Name("vllm.v1.core.kv_cache_manager", "KVCacheManager", "get_blocks", "blocks of a KV load", True),
    Name(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheBlocks",
        "get_unhashed_block_ids_all_groups",
        "blocks of a KV load: those that are not in the cache yet, as NixlConnector counts them",
        True,
    ),
    Name("vllm.v1.kv_cache_interface", "KVCacheConfig", "kv_cache_groups", "bytes of a KV load", True),
    Name("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "layer_names", "bytes of a KV load", True),
    Name("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "kv_cache_spec", "bytes of a KV load", True),
    Name("vllm.v1.kv_cache_interface", "KVCacheSpec", "page_size_bytes", "bytes of a block in one layer", True),
    Name("vllm.config.parallel", "ParallelConfig", "tensor_parallel_size", "workers that load KV", True),
    Name("vllm.config.parallel", "ParallelConfig", "pipeline_parallel_size", "workers that load KV", True),
    Name("vllm.config.parallel", "ParallelConfig", "world_size", "ranks that step together", True),
    Name("vllm.config.parallel", "ParallelConfig", "data_parallel_size", "ranks that step together", True),
    Name("vllm.config.parallel", "ParallelConfig", "data_parallel_rank", "rank among them", True),
    Name("vllm.config.parallel", "ParallelConfig", "enable_expert_parallel", "expert-parallel rank", True),
    Name("vllm.config.parallel", "ParallelConfig", "use_sequence_parallel_moe", "tokens per expert", True),
    Name("vllm.config.parallel", "ParallelConfig", "all2all_backend", "back end of dispatch and combine", True),
    Name("vllm.config.parallel", "ParallelConfig", "use_ubatching", "micro-batches, whose phases overlap", True),
    Name("vllm.config.scheduler", "SchedulerConfig", "max_num_batched_tokens", "tokens per expert", True),
    Name("vllm.config.compilation", "CompilationConfig", "mode", "which functions torch.compile takes apart", True),
    Name("vllm.config.model", "ModelConfig", "is_moe", "whether steps are traced", True),
    Name(_ENGINE_CORE, "EngineCore", "scheduler", "whose forward pass a dummy one is", True),
    Name(_ENGINE_CORE, "EngineCore", "model_executor", "dummy steps", True),
    Name("vllm.v1.executor.abstract", "Executor", "collective_rpc", "dummy steps", True),
    Name(_ENGINE_CORE, "DPEngineCoreProc", "dp_store", "name of the group of ranks, steps on demand of all", True),
    Name("vllm.v1.worker.worker_base", "WorkerWrapperBase", "vllm_config", "whether steps are traced", True),
    Name("vllm.v1.worker.worker_base", "WorkerWrapperBase", "worker", "rank and device", True),
    Name("vllm.v1.worker.worker_base", "WorkerBase", "rank", "rank in the engine", True),
    Name("vllm.v1.worker.worker_base", "WorkerBase", "device", "which clock", True),
    Name(_WORKER, "Worker", "get_model", "begin and end of the model's forward", True),
    Name(_BASE_ROUTER, "BaseRouter", "global_num_experts", "tokens per expert", True),
    Name("vllm.distributed.eplb.eplb_state", "EplbLayerState", "logical_replica_count", "tokens per expert", True),
    Name(_SCHEDULER, "Scheduler", "requests", "the request behind an id"),
    Name(_SCHEDULER, "Scheduler", "vllm_config", "data-parallel rank, engine id"),
    Name(_SCHEDULER, "Scheduler", "connector", "whether KV can be loaded at all", True),
    Name(_SCHEDULER, "Scheduler", "block_size", "KV blocks held", True),
    Name(_SCHEDULER, "Scheduler", "get_request_counts", "running and waiting", True),
    Name(_SCHEDULER, "Scheduler", "waiting", "prompt tokens in the queue", True),
    Name(_SCHEDULER, "Scheduler", "get_kv_cache_usage", "use of the KV cache", True),
    Name(_SCHEDULER, "Scheduler", "finished_recving_kv_req_ids", "a load that is over but not yet noticed", True),
    Name(_SCHEDULER, "Scheduler", "failed_recving_kv_req_ids", "failure of a KV load", True),
    Name(_SCHEDULER, "Scheduler", "kv_cache_manager", "blocks of a KV load", True),
    Name(_SCHEDULER, "Scheduler", "kv_cache_config", "bytes of a KV load", True),
    Name(_OUTPUT_PROCESSOR, "OutputProcessor", "request_states", "whether vLLM still knows the request"),
    Name(_OUTPUT_PROCESSOR, "RequestState", "external_req_id", "the request's id as the client knows it", True),
    Name(_OUTPUT_PROCESSOR, "RequestState", "num_cached_tokens", "cached tokens on llm_request", True),
)


def check(hooks: tuple[Hook, ...] = HOOKS) -> tuple[dict[str, Callable[..., object]], list[Moved]]:
    """The functions to wrap, by hook, and what of ``hooks`` the installed vLLM lacks or has changed."""
    found: dict[str, Callable[..., object]] = {}
    moved: list[Moved] = []
    for hook in hooks:
        try:
            function = inspect.getattr_static(owner_of(hook), hook.function)
            parameters = list(inspect.signature(function).parameters)[1 if hook.owner else 0 :]
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            moved.append(Moved(hook, f"{type(error).__name__}: {error}"))
            continue
        if tuple(parameters[: len(hook.parameters)]) != hook.parameters:
            moved.append(Moved(hook, f"its parameters are now {', '.join(parameters)}"))
            continue
        found[hook.name] = function
    return found, moved


def owner_of(hook: Hook) -> Any:
    """The class or module that has the function; ImportError or AttributeError where there is none."""
    module = importlib.import_module(hook.module)
    return reduce(getattr, hook.owner.split("."), module) if hook.owner else module


def is_checked(version: str) -> bool:
    """Whether ``version`` of vLLM is one that this table was compared with."""
    return ".".join(version.split(".")[:2]) in CHECKED_VERSIONS
