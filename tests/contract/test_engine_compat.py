"""Every place in which llmtrace.engine touches vLLM, compared with the source of installed vLLMs, which need not run.

LLMTRACE_VLLM_SOURCES adds folders that hold a ``vllm`` package, such as an unpacked wheel (separated by ``:``).
"""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

from llmtrace.engine.compat import HOOKS, NAMES, Hook, Name

KIT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrace-kit"


def sources() -> list[Path]:
    found = [path.parent for path in KIT_CACHE.glob("vllm/*/lib/python3*/site-packages/vllm/__init__.py")]
    named = [Path(text) for text in os.environ.get("LLMTRACE_VLLM_SOURCES", "").split(":") if text]
    return found + [path if path.name == "vllm" else path / "vllm" for path in named]


SOURCES = sources()
pytestmark = pytest.mark.skipif(not SOURCES, reason=f"no vLLM under {KIT_CACHE}/vllm; `llmtrace up` installs one")


@pytest.fixture(params=SOURCES, ids=str)
def vllm(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@cache
def class_of(vllm: Path, module: str, owner: str) -> ast.ClassDef | None:
    base = vllm.parent / Path(*module.split("."))
    path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
    if path is None:
        return None
    tree = ast.parse(path.read_text())
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner), None)


def attributes(owner: ast.ClassDef) -> set[str]:
    """Methods, fields, and what its methods assign to ``self``."""
    found: set[str] = set()
    for node in owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    for node in ast.walk(owner):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            found.add(node.attr)
    return found


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_hook_is_there(vllm: Path, hook: Hook) -> None:
    owner = class_of(vllm, hook.module, hook.owner)
    assert owner is not None, f"{hook.module}.{hook.owner} is gone: without it {hook.without}"
    function = next(
        (node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == hook.function), None
    )
    assert function is not None, f"{hook.path} is gone: without it {hook.without}"
    parameters = [argument.arg for argument in function.args.args][1:]
    assert tuple(parameters[: len(hook.parameters)]) == hook.parameters, f"{hook.path} takes {parameters}"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_name_is_there(vllm: Path, name: Name) -> None:
    owner = class_of(vllm, name.module, name.owner)
    assert owner is not None, f"{name.module}.{name.owner} is gone ({name.reason})"
    assert name.attribute in attributes(owner), f"{name.path} is gone ({name.reason})"


def test_traces_go_where_the_flag_says(vllm: Path) -> None:
    """Switching on by environment sets the field that the flag sets."""
    owner = class_of(vllm, "vllm.config.observability", "ObservabilityConfig")
    assert owner is not None
    assert "otlp_traces_endpoint" in attributes(owner)


def test_span_is_called_llm_request(vllm: Path) -> None:
    owner = class_of(vllm, "vllm.v1.engine.output_processor", "OutputProcessor")
    assert owner is not None
    calls = [node for node in ast.walk(owner) if isinstance(node, ast.keyword) and node.arg == "span_name"]
    assert [ast.literal_eval(call.value) for call in calls] == ["llm_request"]


def test_plugins_are_loaded_where_they_are_needed(vllm: Path) -> None:
    """In the API server (its arguments) and in the engine core."""
    for path in ("engine/arg_utils.py", "v1/engine/core.py"):
        assert "load_general_plugins()" in (vllm / path).read_text()


def test_trace_headers_are_echoed_untouched(vllm: Path) -> None:
    """The facts ride in them: the engine core hands the request's mapping on, and nobody checks its keys."""
    scheduler = (vllm / "v1/core/sched/scheduler.py").read_text()
    assert scheduler.count("trace_headers=request.trace_headers") >= 2
    owner = class_of(vllm, "vllm.v1.engine", "EngineCoreOutput")
    assert owner is not None
    field = next(
        node
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "trace_headers"
    )
    assert ast.unparse(field.annotation) == "Mapping[str, str] | None"
