"""Traces: the model, its OTLP form, a reader for Tempo's HTTP API, and the embedded store."""
