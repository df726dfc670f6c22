"""Names of the spans and attributes that the scenarios write and read."""

from __future__ import annotations

# OpenTelemetry GenAI conventions
OPERATION = "gen_ai.operation.name"
REQUEST_MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"

# vLLM's llm_request; latencies in seconds
VLLM_PROMPT_TOKENS = "gen_ai.usage.prompt_tokens"
VLLM_TTFT = "gen_ai.latency.time_to_first_token"
VLLM_QUEUE = "gen_ai.latency.time_in_queue"
VLLM_PREFILL = "gen_ai.latency.time_in_model_prefill"
VLLM_DECODE = "gen_ai.latency.time_in_model_decode"

# The client's span; latencies in milliseconds
SCENARIO = "llmtrace.scenario.name"
RUN_ID = "llmtrace.scenario.run_id"
ARM = "llmtrace.scenario.arm"
PAIR_ID = "llmtrace.scenario.pair_id"
BLOCK = "llmtrace.scenario.block"
WARMUP = "llmtrace.scenario.warmup"
TENANT = "llmtrace.tenant"
CONVERSATION = "llmtrace.conversation"
TURN = "llmtrace.turn"
CLIENT_TTFT = "llmtrace.client.ttft_ms"
CLIENT_E2E = "llmtrace.client.e2e_ms"
FIRST_TOKEN = "first_token"  # noqa: S105 - the name of an event

# The driver's span around one arm's share of a block
BLOCK_SPAN = "llmtrace.scenario.block"
BLOCK_REQUESTS = "llmtrace.scenario.requests"
BLOCK_SERVERS = "llmtrace.scenario.servers"
BLOCK_HITS = "llmtrace.scenario.prefix_cache_hits"
BLOCK_QUERIES = "llmtrace.scenario.prefix_cache_queries"
KV_BLOCK_SIZE = "llmtrace.kv_block_size"

# Endpoint picker
ENDPOINT = "llmtrace.endpoint"
ENDPOINT_NAME = "llmtrace.endpoint.name"
GATEWAY_TTFT = "llmtrace.gateway.ttft_ms"
TOP_ENDPOINTS = "llm_d.epp.picker.top_endpoints"
TOP_SCORES = "llm_d.epp.picker.top_scores"
SCORER_COUNT = "llm_d.epp.scorer.count"
SCORER_TYPE = "llm_d.epp.scorer.type"
SCORER_WEIGHT = "llm_d.epp.scorer.weight"
SCORER_ENDPOINTS = "llmtrace.scorer.endpoints"
SCORER_SCORES = "llmtrace.scorer.scores"
MATCH_TOKENS = "llmtrace.prefix.match_tokens"
ESTIMATED_PROMPT_TOKENS = "llmtrace.prefix.prompt_tokens"

CLIENT_SERVICE = "llmtrace-client"
PICKER_SERVICE = "llm-d-epp"
SERVER_SERVICE = "vllm"
ENVOY_SERVICE = "envoy"
