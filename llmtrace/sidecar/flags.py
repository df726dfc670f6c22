"""The command line: llm-d's flags of pd-sidecar, with its defaults.

Source: llm-d-router, pkg/sidecar/proxy/options.go.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llmtrace.errors import UserError
from llmtrace.flags import Parser, duration
from llmtrace.sidecar.config import Config

ENDPOINTS_VARIABLE = "LLMTRACE_PREFILL_ENDPOINTS"
DESCRIPTION = f"""\
The embedded P/D sidecar, with the flags of llm-d's pd-sidecar. Where the variable {ENDPOINTS_VARIABLE} names an
endpoints file (of the plugin file-discovery), a request may name only the prefill servers in it."""
STAGES = ("prefiller", "decoder", "encoder")
BOOLEANS = ("--secure-proxy", "--tracing", "--enable-ssrf-protection", "--enable-prefiller-sampling", "--zap-devel")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "error": logging.ERROR, "panic": logging.CRITICAL}
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_OWN = "leave it out, or run llm-d's own sidecar with the inventory variable sidecar_binary"


def config(arguments: Sequence[str]) -> Config:
    """Read the command line and the environment; raises UserError where they are wrong."""
    for argument in arguments:
        if argument.startswith("--moriio-"):
            raise UserError(f"{argument.partition('=')[0]}: the embedded sidecar has no MoRI-IO; {_OWN}")
    parser = _parser()
    # A boolean flag of Go takes its value after "=" only.
    found = parser.parse_args([f"{each}=true" if each in BOOLEANS else each for each in arguments])
    endpoints = os.environ.get(ENDPOINTS_VARIABLE)
    if found.enable_ssrf_protection and not endpoints:
        parser.error(
            "--enable-ssrf-protection: the embedded sidecar knows no InferencePool; "
            f"name an endpoints file with the variable {ENDPOINTS_VARIABLE}"
        )
    server_port = found.model_server_port or found.vllm_port
    for flag, first in (("--port", found.port), ("--model-server-port", server_port)):
        if first + found.data_parallel_size - 1 > 65535:
            parser.error(f"{flag}: {found.data_parallel_size} ports from {first} on go beyond 65535")
    return Config(
        bind_address=found.bind_address,
        port=found.port,
        model_server_port=server_port,
        data_parallel_size=found.data_parallel_size,
        pod_ip=os.environ.get("POD_IP", ""),
        prefiller_sampling=found.enable_prefiller_sampling,
        prefill_max_retries=found.prefill_max_retries,
        prefill_retry_backoff_s=found.prefill_retry_backoff,
        enable_tls=frozenset(stage for stages in found.enable_tls for stage in stages),
        tls_insecure_skip_verify=frozenset(stage for stages in found.tls_insecure_skip_verify for stage in stages),
        secure_proxy=found.secure_proxy,
        cert_path=found.cert_path,
        endpoints_file=Path(endpoints) if endpoints else None,
        tracing=found.tracing,
        log_level=found.zap_log_level,
        connect_timeout_s=found.connect_timeout,
        prefill_idle_timeout_s=found.prefill_idle_timeout,
        decode_idle_timeout_s=found.decode_idle_timeout,
    )


def _parser() -> Parser:
    parser = Parser("python -m llmtrace.sidecar", DESCRIPTION)
    add = parser.add_argument
    own = Config()
    sampling = os.environ.get("ENABLE_PREFILLER_SAMPLING", "") in _TRUE
    add("--port", type=_from(1), default=own.port, help="port to listen on (8000)")
    add("--model-server-port", type=_from(1), help="port of the decode server (8200)")
    add("--vllm-port", type=_from(1), default=own.model_server_port, help="the same, its old name")
    add("--data-parallel-size", type=_from(1), default=1, help="ports, and model servers, counted up from the first")
    add("--kv-connector", type=_only("nixlv2"), default="nixlv2", help="must be nixlv2")
    add(
        "--prefill-max-retries", type=_from(0), default=0, help="repetitions after 502, 503 and 504 of a prefill server"
    )
    add("--prefill-retry-backoff", type=duration, default=own.prefill_retry_backoff_s, help="time before each (200ms)")
    add("--enable-prefiller-sampling", type=_boolean, default=sampling, help="choose among several prefill servers")
    add("--secure-proxy", type=_boolean, default=True, help="serve TLS (true)")
    add("--cert-path", type=Path, help="folder of tls.crt and tls.key; without it, the certificate is self-signed")
    add("--enable-tls", type=_stages, action="append", default=[], help="call prefiller, decoder by TLS")
    add("--tls-insecure-skip-verify", type=_stages, action="append", default=[], help="whose certificates not to check")
    add("--enable-ssrf-protection", type=_boolean, default=False, help=f"needs the variable {ENDPOINTS_VARIABLE}")
    add("--tracing", type=_boolean, default=False, help="send spans; the OTEL_* variables say where")
    add("--zap-log-level", type=_level, default=logging.INFO, help="debug, info, error, panic, or a number for debug")
    for flag in ("--pool-group", "--inference-pool", "--max-idle-conns-per-host", "--mooncake-bootstrap-port"):
        add(flag, help="has no effect here")
    for flag in (
        "--p2p-connector-port",
        "--zap-devel",
        "--zap-encoder",
        "--zap-stacktrace-level",
        "--zap-time-encoding",
    ):
        add(flag, help="has no effect here")
    add("--ec-connector", type=_only(""), help="must be empty: there is no encode stage")
    add("--enable-p2p-pull", type=_only(*_FALSE), help="must be false")
    add("--decode-chunk-size", type=_only("0"), help="must be 0")
    add("--metrics-port", type=_only("0"), help="must be 0")
    add("--configuration", type=_only(""), help="must be empty: the embedded sidecar reads flags")
    add("--configuration-file", type=_only(""), help="must be empty: the embedded sidecar reads flags")
    kit = parser.add_argument_group("flags that llm-d's sidecar has not").add_argument
    kit("--bind-address", default=own.bind_address, help="address to listen on (127.0.0.1; llm-d's: all)")
    kit("--connect-timeout", type=duration, default=own.connect_timeout_s, help="for a connection to a server (5s)")
    kit("--prefill-idle-timeout", type=duration, default=own.prefill_idle_timeout_s, help="without a byte from it (5m)")
    kit("--decode-idle-timeout", type=duration, default=own.decode_idle_timeout_s, help="without a byte from it (1h)")
    return parser


def _boolean(text: str) -> bool:
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _from(least: int, most: int = 65535) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return int(text)

    return number


def _only(*values: str) -> Callable[[str], str]:
    def value(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(f"the embedded sidecar has no {text!r}; {_OWN}")
        return text

    return value


def _stages(text: str) -> list[str]:
    stages = text.split(",")
    for stage in stages:
        if stage not in STAGES:
            raise argparse.ArgumentTypeError(f"{stage!r} is none of {', '.join(STAGES)}")
    return stages


def _level(text: str) -> int:
    if text in LEVELS:
        return LEVELS[text]
    _from(1)(text)
    return logging.DEBUG
