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

# llm-d's endpoint picker: spans and their attributes
GATEWAY_SPAN = "gateway.request"
ORCHESTRATION_SPAN = "gateway.request_orchestration"
PROFILE_SPAN = "run_scheduler_profile"
FILTER_SPAN = "filter_endpoints"
SCORING_SPAN = "llm_d.epp.scoring"
SCORER_SPAN_PREFIX = "llm_d.epp.scorer."
PICK_SPAN = "pick_endpoints"
REQUEST_ID = "gen_ai.request.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TARGET_MODEL = "target_model"
REQUEST_PRIORITY = "request_prio"
PROFILE_NAME = "llm_d.epp.scheduling.profile.name"
FILTER_CANDIDATES = "llm_d.epp.filter.candidate_endpoints"
FILTER_REMAINING = "llm_d.epp.filter.filtered_endpoints"
SCORING_CANDIDATES = "llm_d.epp.scoring.candidate_endpoints"
SCORER_NAME = "llm_d.epp.scorer.name"
SCORER_CANDIDATES = "llm_d.epp.scorer.candidate_endpoints"
SCORER_MAX = "llm_d.epp.scorer.score.max"
SCORER_AVG = "llm_d.epp.scorer.score.avg"
SCORER_SCORED = "llm_d.epp.scorer.endpoints_scored"
PICKER_CANDIDATES = "llm_d.epp.picker.candidate_endpoints"

# Headers of llm-d's router protocol
DESTINATION_HEADER = "x-gateway-destination-endpoint"
DROPPED_REASON_HEADER = "x-llm-d-request-dropped-reason"
DROPPED_NO_ENDPOINTS = "rejected-no-endpoints"
FAIRNESS_HEADER = "x-llm-d-inference-fairness-id"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
DESTINATION_NAMESPACE = "envoy.lb"
