"""Embedded endpoint picker: a stand-in for llm-d's EPP that speaks its protocol, configuration, spans and metrics."""
