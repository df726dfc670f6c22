"""The sidecar's command line: llm-d's flags and defaults, and what it says where it does not start."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrace.errors import UserError
from llmtrace.sidecar.__main__ import main
from llmtrace.sidecar.config import Config
from llmtrace.sidecar.flags import ENDPOINTS_VARIABLE, config


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interval = sys.getswitchinterval()
    for name in ("ENABLE_PREFILLER_SAMPLING", "POD_IP", "INFERENCE_POOL", ENDPOINTS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    yield
    sys.setswitchinterval(interval)


def test_defaults_are_llm_ds() -> None:
    found = config([])
    assert found == Config()
    assert (found.port, found.model_server_port, found.data_parallel_size) == (8000, 8200, 1)
    assert (found.prefill_max_retries, found.prefill_retry_backoff_s) == (0, 0.2)
    assert (found.secure_proxy, found.cert_path, found.tracing, found.prefiller_sampling) == (True, None, False, False)
    assert (found.enable_tls, found.tls_insecure_skip_verify) == (frozenset(), frozenset())
    assert found.bind_address == "127.0.0.1"


def test_a_command_line_of_llm_ds_guides() -> None:
    """helm values of guides/pd-disaggregation, without Kubernetes."""
    found = config(
        ["--port=8000", "--vllm-port=8200", "--kv-connector=nixlv2", "--zap-log-level=5", "--secure-proxy=false"]
    )
    assert found == Config(secure_proxy=False, log_level=logging.DEBUG)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--port", "9000"], "port", 9000),
        (["--model-server-port=9200"], "model_server_port", 9200),
        (["--vllm-port=9200"], "model_server_port", 9200),
        (["--vllm-port=9200", "--model-server-port=9300"], "model_server_port", 9300),
        (["--data-parallel-size=8"], "data_parallel_size", 8),
        (["--prefill-max-retries=3"], "prefill_max_retries", 3),
        (["--prefill-retry-backoff=1m30s"], "prefill_retry_backoff_s", 90.0),
        (["--prefill-retry-backoff=50ms"], "prefill_retry_backoff_s", 0.05),
        (["--enable-prefiller-sampling"], "prefiller_sampling", True),
        (["--secure-proxy"], "secure_proxy", True),
        (["--secure-proxy=f"], "secure_proxy", False),
        (["--tracing"], "tracing", True),
        (["--tracing=true"], "tracing", True),
        (["--tracing=False"], "tracing", False),
        (["--cert-path=/c"], "cert_path", Path("/c")),
        (["--enable-tls=prefiller,decoder"], "enable_tls", {"prefiller", "decoder"}),
        (["--enable-tls=prefiller", "--enable-tls", "encoder"], "enable_tls", {"prefiller", "encoder"}),
        (["--tls-insecure-skip-verify=decoder"], "tls_insecure_skip_verify", {"decoder"}),
        (["--zap-log-level=error"], "log_level", logging.ERROR),
        (["--bind-address=0.0.0.0"], "bind_address", "0.0.0.0"),
        (["--connect-timeout=1s"], "connect_timeout_s", 1.0),
        (["--prefill-idle-timeout=30s"], "prefill_idle_timeout_s", 30.0),
        (["--decode-idle-timeout=2h"], "decode_idle_timeout_s", 7200.0),
    ],
)
def test_values(arguments: list[str], field: str, value: object) -> None:
    assert getattr(config(arguments), field) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pool-group=inference.networking.k8s.io", "--inference-pool=default/pool"],
        ["--max-idle-conns-per-host=2048"],
        ["--mooncake-bootstrap-port=8998", "--p2p-connector-port=7777"],
        ["--ec-connector=", "--enable-p2p-pull=false", "--decode-chunk-size=0", "--metrics-port=0"],
        ["--zap-devel", "--zap-encoder=json", "--zap-stacktrace-level=panic", "--zap-time-encoding=iso8601"],
        ["--enable-ssrf-protection=false"],
    ],
)
def test_what_has_no_effect_is_accepted(arguments: list[str]) -> None:
    assert config(arguments) == Config()


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_PREFILLER_SAMPLING", "true")
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    monkeypatch.setenv(ENDPOINTS_VARIABLE, "/e.yaml")
    found = config(["--enable-ssrf-protection"])
    assert (found.prefiller_sampling, found.pod_ip, found.endpoints_file) == (True, "10.0.0.7", Path("/e.yaml"))
    assert config(["--enable-prefiller-sampling=false"]).prefiller_sampling is False


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prot=1"], ["unknown flag --prot", "'--port'"]),
        (["--secure-serving=false"], ["unknown flag --secure-serving"]),
        (["--secure-proxy", "false"], ["false"]),
        (["--port=0"], ["--port", "'0' is no number from 1 to 65535"]),
        (["--port=65535", "--data-parallel-size=2"], ["--port", "2 ports from 65535 on go beyond 65535"]),
        (["--model-server-port=65530", "--data-parallel-size=8"], ["--model-server-port", "beyond 65535"]),
        (["--data-parallel-size=0"], ["--data-parallel-size", "'0' is no number"]),
        (["--kv-connector=sglang"], ["--kv-connector", "'sglang'", "sidecar_binary"]),
        (["--ec-connector=ec-nixl"], ["--ec-connector", "'ec-nixl'", "sidecar_binary"]),
        (["--enable-p2p-pull=true"], ["--enable-p2p-pull", "'true'"]),
        (["--decode-chunk-size=64"], ["--decode-chunk-size", "'64'"]),
        (["--metrics-port=9090"], ["--metrics-port"]),
        (["--configuration={port: 1}"], ["--configuration"]),
        (["--configuration-file=x.yaml"], ["--configuration-file"]),
        (["--moriio-write-mode"], ["--moriio-write-mode", "no MoRI-IO", "sidecar_binary"]),
        (["--moriio-dp-size=2"], ["--moriio-dp-size", "no MoRI-IO"]),
        (["--enable-ssrf-protection"], ["--enable-ssrf-protection", ENDPOINTS_VARIABLE]),
        (["--enable-tls=all"], ["--enable-tls", "'all' is none of prefiller, decoder, encoder"]),
        (["--tls-insecure-skip-verify=x"], ["--tls-insecure-skip-verify", "'x'"]),
        (["--prefill-max-retries=-1"], ["--prefill-max-retries", "'-1'"]),
        (["--prefill-retry-backoff=0s"], ["--prefill-retry-backoff", "'0s' is no duration"]),
        (["--prefill-retry-backoff=1d"], ["--prefill-retry-backoff", "'1d' is no duration"]),
        (["--tracing=yes"], ["--tracing", "'yes' is neither true nor false"]),
        (["--zap-log-level=loud"], ["--zap-log-level", "'loud'"]),
        (["more"], ["more"]),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        config(arguments)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmtrace.sidecar: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "tls.crt and tls.key in"),
        ({"tls.crt": "x", "tls.key": "y"}, "cannot be used"),
    ],
)
def test_a_certificate_that_cannot_be_used(
    tmp_path: Path, files: dict[str, str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main([f"--cert-path={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmtrace.sidecar: --cert-path: ")
    assert part in line


def test_an_endpoints_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENDPOINTS_VARIABLE, str(tmp_path / "none.yaml"))
    assert main(["--secure-proxy=false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.yaml cannot be read" in line
