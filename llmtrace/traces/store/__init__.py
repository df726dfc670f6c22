"""The kit's embedded trace store: OTLP/HTTP in, Tempo's HTTP API out, one DuckDB file beneath."""
