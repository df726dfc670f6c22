"""vLLM servers of benchmarks and tests: what the kit's own stack gives them, and a tiny model."""

from __future__ import annotations

from pathlib import Path

TINY_MODEL_SCRIPT = Path(__file__).with_name("tiny_model.py")
"""Run by vLLM's Python with the folder to make."""
EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker process that vLLM makes on CPUs spins on a core while it waits; this one runs in the engine core's."""
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "OTEL_SERVICE_NAME": "vllm",
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
}
