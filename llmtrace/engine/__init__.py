"""A vLLM plugin: what happened to a request inside the model server, as spans below vLLM's ``llm_request``.

vLLM loads it by itself, in each of its processes, wherever the package is installed (entry point
``vllm.general_plugins``). It works for requests that come with a sampled ``traceparent`` to a server with
``--otlp-traces-endpoint``, or with OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT set; for all
others nothing is collected. ``llmtrace.engine.compat`` lists every place in which it touches vLLM, and why there.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Called by vLLM, once per process or more; never raises."""
    try:
        from llmtrace.engine import plugin

        plugin.install()
    except Exception as error:
        from llmtrace.engine.hooks import logger

        logger.error("llmtrace: no engine spans: %s", type(error).__name__)
