"""The picker's command line: what it accepts, and what it says where it does not start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from picking import PREFIX_AWARE

from llmtrace.errors import UserError
from llmtrace.picker.__main__ import main, options
from llmtrace.picker.server import Options

REQUIRED = ("--pool-name", "llmtrace", "--config-file", "picker.yaml")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No export, and the interpreter's settings as they were."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, **changes: Any) -> Path:
    """A configuration with one endpoint that nobody serves."""
    (folder / "endpoints.yaml").write_text('endpoints: [{name: a, address: 127.0.0.1, port: "1"}]')
    discovery = {**PREFIX_AWARE["plugins"][0], "parameters": {"path": str(folder / "endpoints.yaml")}}
    path = folder / "picker.yaml"
    path.write_text(yaml.safe_dump({**PREFIX_AWARE, "plugins": [discovery, *PREFIX_AWARE["plugins"][1:]], **changes}))
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the picker says where it does not start: one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("llmtrace.picker: ")
    return line


def test_llm_ds_own_command_line_is_accepted() -> None:
    found = options(
        [
            *("--pool-name", "llmtrace", "--pool-namespace", "default", "--config-file", "picker.yaml"),
            *("--grpc-port", "9102", "--grpc-health-port", "9103", "--metrics-port", "9190"),
            *("--secure-serving=false", "--metrics-endpoint-auth=false"),
        ]
    )
    assert found == Options("llmtrace", "default", Path("picker.yaml"), "127.0.0.1", 9102, 9103, 9190, 0.5)


def test_defaults_are_llm_ds() -> None:
    assert options(REQUIRED) == Options("llmtrace", "default", Path("picker.yaml"), "127.0.0.1", 9002, 9003, 9090, 0.5)


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("--refresh-metrics-interval=50ms", "refresh_interval_s", 0.05),
        ("--refresh-metrics-interval=1.5s", "refresh_interval_s", 1.5),
        ("--refresh-metrics-interval=2m", "refresh_interval_s", 120.0),
        ("--grpc-port=0", "grpc_port", 0),
        ("--grpc-port=65535", "grpc_port", 65535),
        ("--bind-address=0.0.0.0", "bind_address", "0.0.0.0"),
        ("--pool-namespace=tenants", "pool_namespace", "tenants"),
        ("--secure-serving=False", "pool_name", "llmtrace"),
        ("--metrics-endpoint-auth=0", "pool_name", "llmtrace"),
    ],
)
def test_values(argument: str, field: str, value: object) -> None:
    assert getattr(options([*REQUIRED, argument]), field) == value


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*REQUIRED, "--grpc-prt", "1"], ["unknown flag --grpc-prt", "'--grpc-port'"]),
        ([*REQUIRED, "--grpc-prt=1"], ["unknown flag --grpc-prt", "'--grpc-port'"]),
        ([*REQUIRED, "--metrics-endpoint-aut=false"], ["unknown flag --metrics-endpoint-aut;", "-endpoint-auth'"]),
        ([*REQUIRED, "--pool"], ["unknown flag --pool", "'--pool-name'"]),
        ([*REQUIRED, "-x"], ["-x"]),
        ([*REQUIRED, "more"], ["more"]),
        ([*REQUIRED, "--secure-serving=true"], ["--secure-serving", "only false"]),
        ([*REQUIRED, "--metrics-endpoint-auth=true"], ["--metrics-endpoint-auth", "only false"]),
        ([*REQUIRED, "--grpc-port=65536"], ["--grpc-port", "'65536' is no port"]),
        ([*REQUIRED, "--grpc-health-port=-1"], ["--grpc-health-port", "'-1' is no port"]),
        ([*REQUIRED, "--metrics-port=http"], ["--metrics-port", "'http' is no port"]),
        ([*REQUIRED, "--metrics-port="], ["--metrics-port", "'' is no port"]),
        ([*REQUIRED, "--refresh-metrics-interval=50"], ["--refresh-metrics-interval", "'50' is no duration"]),
        ([*REQUIRED, "--refresh-metrics-interval=0s"], ["--refresh-metrics-interval", "'0s' is no duration"]),
        ([*REQUIRED, "--refresh-metrics-interval=-1s"], ["--refresh-metrics-interval", "'-1s' is no duration"]),
        ([*REQUIRED, "--refresh-metrics-interval=soon"], ["--refresh-metrics-interval", "'soon' is no duration"]),
        ([*REQUIRED, "--grpc-port"], ["--grpc-port"]),
        (["--config-file", "picker.yaml"], ["--pool-name"]),
        (["--pool-name", "llmtrace"], ["--config-file"]),
        ([], ["--pool-name", "--config-file"]),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        options(arguments)
    line = refused(arguments, capsys)
    for part in parts:
        assert part in line


def test_a_config_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.yaml"
    line = refused(["--pool-name", "p", "--config-file", str(path)], capsys)
    assert f"the configuration {path} cannot be read" in line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"plugins": [{"type": "quue-scorer"}]}, ["plugins[0]", "'quue-scorer'", "'queue-scorer'"]),
        ({"kind": "Deployment"}, ["kind"]),
        ({"flowControl": {}}, ["flowControl"]),
    ],
)
def test_a_wrong_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], parts: list[str]
) -> None:
    line = refused(["--pool-name", "p", "--config-file", str(written(tmp_path, **changes))], capsys)
    for part in parts:
        assert part in line


def test_an_endpoints_file_that_is_not_there(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "endpoints.yaml").unlink()
    line = refused(["--pool-name", "p", "--config-file", str(config)], capsys)
    assert "endpoints.yaml cannot be read" in line


@pytest.mark.parametrize("flag", ["--grpc-port", "--grpc-health-port", "--metrics-port"])
def test_a_taken_port(config: Path, flag: str) -> None:
    """In a process of its own, where nothing is between the log and standard error."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--grpc-port": 0, "--grpc-health-port": 0, "--metrics-port": 0, flag: port}
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "llmtrace.picker", "--pool-name", "p"),
                *("--config-file", str(config), *(f"{name}={value}" for name, value in ports.items())),
            ],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    said = f"llmtrace.picker: 127.0.0.1:{port} cannot be listened on: stop what uses it, or change {flag}"
    *before, last = ended.stderr.splitlines()
    assert last == said
    assert all(" INFO llmtrace." in line or " WARNING llmtrace." in line for line in before), "only the log precedes it"
