"""Content of a state file."""

from __future__ import annotations

STACK = {
    "profile": "local",
    "scenario": "prefix-cache",
    "run_dir": "/run",
    "log_dir": "/log",
    "supervisor_conf": "/etc/supervisord.conf",
    "model": "m",
    "gateways": {"prefix-aware": "http://127.0.0.1:1", "random": "http://127.0.0.1:2"},
    "servers": [{"name": "vllm-0", "url": "http://127.0.0.1:3", "process": "vllm-0"}],
    "kv_block_size": 32,
    "pickers": {
        "random": {
            "process": "picker-random",
            "grpc_port": 4,
            "health_port": 5,
            "metrics_port": 6,
            "config": "/etc/random.yaml",
        }
    },
    "envoy_admin": "http://127.0.0.1:7",
    "collector_otlp_grpc": "http://127.0.0.1:8",
    "collector_otlp_http": "http://127.0.0.1:9",
    "collector_health": "http://127.0.0.1:10",
    "store": "http://127.0.0.1:11",
    "prometheus": "http://127.0.0.1:12",
    "versions": {"vllm": "0.32.0"},
}
