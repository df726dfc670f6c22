from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from example_stack import STACK
from typer.testing import CliRunner

from llmtrace import cli_stack
from llmtrace.deploy import playbook, source
from llmtrace.errors import UserError
from llmtrace.stack import Stack


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    cli_stack.mount(app)
    return app


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place for state and cache."""
    monkeypatch.delenv("LLMTRACE_STACK", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_status_without_a_stack_says_what_to_run(app: typer.Typer, state: Path) -> None:
    result = CliRunner().invoke(app, ["status"])
    assert isinstance(result.exception, UserError)
    assert "run `llmtrace up`" in str(result.exception)


def test_status_of_a_stack_that_died_is_1(app: typer.Typer, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = state / "stack.json"
    Stack.model_validate(STACK | {"run_dir": state}).save(path)
    monkeypatch.setenv("LLMTRACE_STACK", str(path))
    result = CliRunner().invoke(app, ["status", "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == [*("envoy", "picker-random", "vllm-0", "collector", "store", "prometheus")]
    assert {(row["process"], row["ready"]) for row in rows} == {("MISSING", False)}
    assert CliRunner().invoke(app, ["status"]).exit_code == 1


def test_status_of_a_cluster_says_who_knows(app: typer.Typer, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = state / "stack.json"
    Stack.model_validate(STACK | {"profile": "cluster"}).save(path)
    monkeypatch.setenv("LLMTRACE_STACK", str(path))
    result = CliRunner().invoke(app, ["status"])
    assert isinstance(result.exception, UserError)
    assert "see `kubectl get pods --all-namespaces`" in str(result.exception)


def test_doctor_finds_a_half_finished_install(app: typer.Typer, state: Path) -> None:
    (state / "cache/llmtrace-kit/collector/0.160.0.partial").mkdir(parents=True)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 2
    failed = {check["name"]: check["message"] for check in json.loads(result.stdout) if not check["ok"]}
    assert "collector 0.160.0 was interrupted" in failed["installs"]
    assert "FAIL installs" in CliRunner().invoke(app, ["doctor"]).stdout


def test_up_passes_its_arguments_to_ansible_and_reports_failure(
    app: typer.Typer, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert CliRunner().invoke(app, ["up", "--list-tasks", "-e", "vllm_servers=2"]).exit_code == 0
    assert "preflight : Check platform" in capfd.readouterr().out
    assert CliRunner().invoke(app, ["up", "--no-such-option"]).exit_code == 1
    assert CliRunner().invoke(app, ["down", "--purge", "--list-tasks"]).exit_code == 0
    assert "Stop every process" in capfd.readouterr().out


def test_up_fails_with_one_sentence_for_a_path_that_is_not_there(
    app: typer.Typer, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "up",
        "--check",
        "--skip-tags",
        "doctor",
        "--tags",
        "collector",
        "-e",
        "collector_binary=/nowhere",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert "collector_binary is /nowhere, which does not exist: correct the path" in capfd.readouterr().err


def test_outside_a_checkout_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(playbook, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="clone the repository"):
        playbook.run("site.yml")


def test_the_source_digests_follow_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("picker", "sidecar", "traces", "autoscale", "deploy", "engine", "semconv"):
        (tmp_path / folder).mkdir()
    for name in ("__init__.py", *source.COMMON):
        (tmp_path / name).touch()
    monkeypatch.setattr(source, "PACKAGE", tmp_path)
    before = source.digests()
    assert source.digests() == before
    (tmp_path / "picker/new.py").touch()
    after = source.digests()
    assert (after["services"] != before["services"], after["engine"] != before["engine"]) == (True, False)
    (tmp_path / "engine/new.py").touch()
    assert source.digest("engine") != before["engine"]


def test_two_runs_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with playbook._lock(), pytest.raises(UserError, match="another `llmtrace up` or `llmtrace down` is at work"):
        playbook.run("site.yml", ["--list-tasks"])
