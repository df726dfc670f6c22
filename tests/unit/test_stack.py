from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_stack import STACK

from llmtrace.errors import UserError
from llmtrace.stack import Stack, default_path


def test_a_saved_stack_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "stack.json"
    stack = Stack.model_validate(STACK)
    assert stack.save(path)
    assert Stack.load(path) == stack
    assert list(tmp_path.iterdir()) == [path]


def test_saving_the_same_stack_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stack.json"
    stack = Stack.model_validate(STACK)
    stack.save(path)
    written = path.stat().st_mtime_ns
    assert not stack.save(path)
    assert path.stat().st_mtime_ns == written


def test_the_variable_names_the_state_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMTRACE_STACK", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "llmtrace-kit/local/stack.json"
    monkeypatch.setenv("LLMTRACE_STACK", str(tmp_path / "elsewhere.json"))
    Stack.model_validate(STACK).save(tmp_path / "elsewhere.json")
    assert Stack.load().model == "m"


def test_of_a_cluster_addresses_are_enough(tmp_path: Path) -> None:
    told = ("scenario", "model", "gateways", "collector_otlp_grpc", "store")
    path = tmp_path / "stack.json"
    path.write_text(json.dumps({"profile": "cluster", "run_dir": ".", **{name: STACK[name] for name in told}}))
    stack = Stack.load(path)
    assert (stack.servers, stack.pickers, stack.kv_block_size) == ([], {}, 16)


def test_without_a_stack_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No stack is up .*run `llmtrace up`"):
        Stack.load(tmp_path / "stack.json")


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"profile": "local", "surprise": 1}'])
def test_a_broken_state_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stack.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cannot be read .*run `llmtrace up` again") as error:
        Stack.load(path)
    assert "\n" not in str(error.value)
