"""Are prompts cached, where, and what is it worth?"""

from __future__ import annotations

from grafana.board import COMPARED, YOURS, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import INTERVAL, PICKER, SERVER, TTFT, VLLM, mean, per, quantile, rate

HITS, LOOKUPS = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
NAMESPACE = 'namespace=~"$namespace"'
PRECISE = "only pickers with the precise prefix cache count it"
CACHED = f'llmtrace_prompt_cached=~"none|some|most",{SERVER}'


def lookup_hits(counter: str) -> str:
    """A counter of the precise index over all pickers."""
    return rate(f"llm_d_epp_kv_cache_index_{counter}_total", NAMESPACE)


def lost_events(why: str) -> str:
    """Events of the servers' KV caches that pickers lost lately."""
    return f"sum by (pod_identifier) (increase(llmtrace_kv_cache_events_{why}_total{{{NAMESPACE}}}[{INTERVAL}]))"


SHARE = Row(
    "What is cached",
    (
        Panel(
            "Hit share",
            "Share of the prompt tokens that the model servers found in their prefix caches.",
            "percentunit",
            (Query(per(rate(HITS, VLLM), rate(LOOKUPS, VLLM)), "hit share"),),
            kind="stat",
            thresholds=limits(0.5, 0.2),
            maximum=1,
            width=4,
        ),
        Panel(
            "Hit share by endpoint",
            "Share of the prompt tokens that each model server found in its prefix cache.",
            "percentunit",
            (Query(per(rate(HITS, VLLM, "instance"), rate(LOOKUPS, VLLM, "instance")), "{{instance}}"),),
            thresholds=limits(0.5, 0.2),
            maximum=1,
            width=10,
            endpoint_label="instance",
        ),
        Panel(
            "Requests by cached share",
            "Requests per second whose prompt was not cached, cached to less than half, or to half and more, by "
            "endpoint.",
            "reqps",
            (
                Query(
                    rate(f"{TTFT}_count", CACHED, "llmtrace_prompt_cached, service_instance_id"),
                    "{{llmtrace_prompt_cached}} {{service_instance_id}}",
                ),
            ),
            no_limit=COMPARED,
            stacked=True,
            width=10,
        ),
    ),
)

WORTH = Row(
    "What it is worth",
    (
        Panel(
            "TTFT, cached against uncached",
            "Median time to the first token in the model servers, by how much of the prompt was cached. An exemplar "
            "leads to the trace. Long prompts are cached more often than short ones, so that the difference is not "
            "the cache's alone.",
            "s",
            (
                Query(
                    quantile(0.5, TTFT, CACHED, "llmtrace_prompt_cached"),
                    "{{llmtrace_prompt_cached}}",
                    exemplars=True,
                ),
            ),
            thresholds=limits(1, 2),
        ),
        Panel(
            "TTFT, cached against uncached, by endpoint",
            "Median time to the first token of each model server, by how much of the prompt was cached.",
            "s",
            (
                Query(
                    quantile(0.5, TTFT, CACHED, "llmtrace_prompt_cached, service_instance_id"),
                    "{{service_instance_id}} {{llmtrace_prompt_cached}}",
                ),
            ),
            thresholds=limits(1, 2),
            endpoint_label="service_instance_id",
        ),
        Panel(
            "TTFT by picker",
            "Time to the first part of the response, 95 %, of each picker: with several at work, such as one that "
            "looks at the cache and one that does not, this compares them.",
            "s",
            (Query(quantile(0.95, "llm_d_epp_request_ttft_seconds", PICKER, "instance"), "p95 {{instance}}"),),
            thresholds=limits(1, 2),
        ),
        Panel(
            "Cached tokens per request by picker",
            "Mean number of prompt tokens that came from the cache, as the model servers told it in their responses.",
            "short",
            (Query(mean("llm_d_epp_request_cached_tokens", PICKER, "instance"), "{{instance}}"),),
            no_limit=COMPARED,
        ),
    ),
)

INDEX = Row(
    "What the pickers believe",
    (
        Panel(
            "Predicted share",
            "Mean share of the prompt that the picked endpoint should have had cached, by picker. Far above the hit "
            "share: the index is out of date.",
            "percentunit",
            (Query(mean("llm_d_epp_prefix_indexer_hit_ratio", NAMESPACE, "instance"), "{{instance}}"),),
            no_limit=COMPARED,
            maximum=1,
            width=8,
        ),
        Panel(
            "Blocks in the index",
            "Blocks of prompts that each picker knows.",
            "short",
            (Query(f"sum by (instance) (llm_d_epp_prefix_indexer_size{{{NAMESPACE}}})", "{{instance}}"),),
            no_limit=YOURS,
            width=8,
        ),
        Panel(
            "Precise index",
            "Of pickers that follow the servers' KV caches: lookups, leading blocks found, blocks that came and went, "
            "per second.",
            "ops",
            (
                Query(lookup_hits("lookup_requests"), "lookups", may_be_empty=PRECISE),
                Query(lookup_hits("lookup_hits"), "blocks found", may_be_empty=PRECISE),
                Query(lookup_hits("admissions"), "blocks that came", may_be_empty=PRECISE),
                Query(lookup_hits("evictions"), "blocks that went", may_be_empty=PRECISE),
            ),
            no_limit=COMPARED,
            width=8,
        ),
        Panel(
            "Missed KV events",
            "Messages of model servers about their KV caches that a picker missed or did not understand, in the range.",
            "short",
            (
                Query(
                    lost_events("missed"),
                    "missed {{pod_identifier}}",
                    may_be_empty=PRECISE,
                ),
                Query(
                    lost_events("dropped"),
                    "not understood {{pod_identifier}}",
                    may_be_empty=PRECISE,
                ),
            ),
            thresholds=limits(1, 100),
            width=12,
        ),
        Panel(
            "KV cache in use",
            "Share of the blocks that running requests hold. What they do not hold can keep prefixes.",
            "percentunit",
            (Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{VLLM}}})", "{{instance}}"),),
            thresholds=limits(0.8, 0.95),
            maximum=1,
            width=12,
            endpoint_label="instance",
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Long prompts without a cached token",
            "Requests of more than 500 prompt tokens of which none came from the cache.",
            '{ resource.service.name = "vllm" && name = "llm_request" && span.gen_ai.usage.prompt_tokens > 500 '
            "&& span.gen_ai.usage.cache_read.input_tokens = 0 "
            '&& resource.service.instance.id =~ "$endpoint" }',
        ),
        TraceTable(
            "Prompts from the cache",
            "Requests of more than 500 prompt tokens of which at least 256 came from the cache.",
            '{ resource.service.name = "vllm" && name = "llm_request" && span.gen_ai.usage.prompt_tokens > 500 '
            "&& span.gen_ai.usage.cache_read.input_tokens >= 256 "
            '&& resource.service.instance.id =~ "$endpoint" }',
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Prompts without a cached token (Jaeger)",
            "In Jaeger, whose search knows no greater-than: requests of which no prompt token came from the cache.",
            service="vllm",
            operation="llm_request",
            tags="gen_ai.usage.cache_read.input_tokens=0",
            width=24,
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-prefix-cache",
    "LLM inference: prefix cache",
    "How much of the prompts comes from the prefix caches, at which endpoint, and what it does to the time to the "
    "first token.",
    (SHARE, WORTH, INDEX, TRACES, JAEGER),
    scenarios=("prefix-cache",),
)
