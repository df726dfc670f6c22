"""The settings of a sidecar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """Where the sidecar listens, what it calls and how; times in seconds.

    ``port`` and ``model_server_port`` are those of data-parallel rank 0; the others count up. ``cert_path`` is a folder
    with tls.crt and tls.key; without it the sidecar certifies itself. ``endpoints_file`` lists the prefill servers that
    a request may name; without it, it may name any.
    """

    bind_address: str = "127.0.0.1"
    port: int = 8000
    model_server_port: int = 8200
    data_parallel_size: int = 1
    pod_ip: str = ""
    prefiller_sampling: bool = False
    prefill_max_retries: int = 0
    prefill_retry_backoff_s: float = 0.2
    enable_tls: frozenset[str] = frozenset()
    tls_insecure_skip_verify: frozenset[str] = frozenset()
    secure_proxy: bool = True
    cert_path: Path | None = None
    endpoints_file: Path | None = None
    tracing: bool = False
    log_level: int = 20
    connect_timeout_s: float = 5.0
    prefill_idle_timeout_s: float = 300.0
    decode_idle_timeout_s: float = 3600.0
