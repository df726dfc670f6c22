"""The plugins of the picker, one file each; importing this package registers them all."""

from llmtrace.picker.plugins import (
    approx_prefix_cache_producer,
    file_discovery,
    kv_cache_utilization_scorer,
    load_aware_scorer,
    max_score_picker,
    precise_prefix_cache_producer,
    prefix_cache_scorer,
    queue_scorer,
    random_picker,
    single_profile_handler,
    token_producer,
    weighted_random_picker,
)

__all__ = [
    "approx_prefix_cache_producer",
    "file_discovery",
    "kv_cache_utilization_scorer",
    "load_aware_scorer",
    "max_score_picker",
    "precise_prefix_cache_producer",
    "prefix_cache_scorer",
    "queue_scorer",
    "random_picker",
    "single_profile_handler",
    "token_producer",
    "weighted_random_picker",
]
