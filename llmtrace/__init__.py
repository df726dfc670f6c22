"""Distributed tracing of LLM inference on llm-d."""

__version__ = "0.1.0"
