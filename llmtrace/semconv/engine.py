"""Names of the spans, events and attributes inside a model server.

Times are milliseconds where the name ends in ``_ms``. vLLM's own ``gen_ai.latency.*`` on ``llm_request`` are seconds.
"""

from __future__ import annotations

SCOPE = "llmtrace.engine"

# Spans; llm_request is vLLM's
REQUEST_SPAN = "llm_request"
QUEUE_SPAN = "queue"
KV_LOAD_SPAN = "kv_load"
PREFILL_SPAN = "prefill"
DECODE_SPAN = "decode"

# Events
CHUNK_EVENT = "prefill_chunk"
FIRST_TOKEN_EVENT = "first_token"  # noqa: S105 - the name of an event
PREEMPTED_EVENT = "preempted"
RESUMED_EVENT = "resumed"
ABORT_EVENT = "abort"

# Every span of the engine
REQUEST_ID = "gen_ai.request.id"
ENGINE_ID = "llmtrace.engine.id"
DP_RANK = "llmtrace.engine.dp_rank"
LORA = "llmtrace.request.lora"
STRUCTURED_OUTPUT = "llmtrace.request.structured_output"

# llm_request
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
PROMPT_TOKENS = "gen_ai.usage.prompt_tokens"
COMPLETION_TOKENS = "gen_ai.usage.completion_tokens"
E2E_LATENCY = "gen_ai.latency.e2e"

# queue
QUEUE_REASON = "llmtrace.queue.reason"
QUEUE_POSITION = "llmtrace.queue.position"
RUNNING = "llmtrace.queue.running"
WAITING = "llmtrace.queue.waiting"
KV_USAGE = "llmtrace.kv_cache.usage"
REASON_ADMISSION = "admission"
REASON_KV_LOADED = "kv_loaded"

# kv_load
LOAD_TOKENS = "llmtrace.kv_load.tokens"
LOAD_REMOTE_ENGINE = "llmtrace.kv_load.remote_engine_id"
LOAD_FAILED = "llmtrace.kv_load.failed"

# prefill
INPUT_TOKENS = "gen_ai.usage.input_tokens"
COMPUTED_TOKENS = "llmtrace.prefill.computed_tokens"
LOCAL_CACHED_TOKENS = "llmtrace.prefill.local_cached_tokens"
EXTERNAL_CACHED_TOKENS = "llmtrace.prefill.external_cached_tokens"
CHUNKS = "llmtrace.prefill.chunks"
CHUNK_TOKENS = "llmtrace.chunk.tokens"
CHUNK_BATCH_REQUESTS = "llmtrace.chunk.batch_requests"
CHUNK_BATCH_TOKENS = "llmtrace.chunk.batch_tokens"

# decode
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
TPOT_MEAN = "llmtrace.decode.tpot_mean_ms"
GAP_MAX = "llmtrace.decode.gap_max_ms"
DRAFT_TOKENS = "llmtrace.spec_decode.draft_tokens"
ACCEPTED_TOKENS = "llmtrace.spec_decode.accepted_tokens"
ACCEPTANCE_RATE = "llmtrace.spec_decode.acceptance_rate"

# The last span of a request, and llm_request
KV_BLOCKS = "llmtrace.kv_cache.blocks"
PREEMPTIONS = "llmtrace.preemptions"
PREEMPTED_TIME = "llmtrace.preempted_ms"

# Metrics
DROPPED_METRIC = "llmtrace.engine.dropped_requests"
