"""Every place in which llmtrace.engine touches vLLM, compared with the source of vLLMs, none of which runs.

Always with the releases that the plugin says it was checked with, and with those that the kit has installed.
LLMTRACE_VLLM_SOURCES adds folders that hold a ``vllm`` package, such as a checkout (separated by ``:``). With
LLMTRACE_OFFLINE set, a release whose source was never fetched is skipped.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from vllm_source import PINS, SourceUnavailableError, fetch, folder

from llmtrace.engine import plugin
from llmtrace.engine.compat import CHECKED_VERSIONS, HOOKS, NAMES, STEP_HOOKS, Hook, Name
from llmtrace.engine.source import attributes, class_of, lacking
from llmtrace.stack import cache_home

ALL_HOOKS = (*HOOKS, *STEP_HOOKS)
pytestmark = pytest.mark.timeout(300)  # a first fetch over a slow line
CACHE = cache_home()


def others() -> list[Path]:
    """The packages ``vllm`` that are on this machine."""
    installed = [path.parent for path in CACHE.glob("vllm/*/lib/python3*/site-packages/vllm/__init__.py")]
    named = [Path(text) for text in os.environ.get("LLMTRACE_VLLM_SOURCES", "").split(":") if text]
    return installed + [path if path.name == "vllm" else path / "vllm" for path in named]


@pytest.fixture(scope="session", params=[*PINS, *others()], ids=str)
def vllm(request: pytest.FixtureRequest) -> Path:
    """The package ``vllm`` of a release or a folder."""
    if isinstance(request.param, Path):
        return request.param
    version: str = request.param
    if os.environ.get("LLMTRACE_OFFLINE") and not folder(version, CACHE).is_dir():
        pytest.skip(f"LLMTRACE_OFFLINE is set, and the source of vLLM {version} was not fetched before")
    try:
        return fetch(version, PINS[version], CACHE)
    except SourceUnavailableError as error:
        pytest.fail(f"{error} LLMTRACE_OFFLINE=1 skips what needs it.", pytrace=False)


def test_the_releases_are_those_that_the_plugin_was_checked_with() -> None:
    assert {".".join(version.split(".")[:2]) for version in PINS} == set(CHECKED_VERSIONS)


def test_every_hook_and_name_is_there(vllm: Path) -> None:
    assert lacking(vllm) == []


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


# That the comparison can fail: a package written from the table, with one thing of it changed.


def written(root: Path, hooks: Iterable[Hook] = ALL_HOOKS, names: Iterable[Name] = NAMES) -> Path:
    """A package ``vllm`` that has these, and nothing else."""
    bodies: dict[str, dict[str, list[str]]] = {}
    for hook in hooks:
        parameters = ", ".join((*(["self"] if hook.owner else []), *hook.parameters, "more=None"))
        bodies.setdefault(hook.module, {}).setdefault(hook.owner, []).append(f"def {hook.function}({parameters}): ...")
    for name in names:
        bodies.setdefault(name.module, {}).setdefault(name.owner, []).append(f"{name.attribute}: object")
    (root / "vllm").mkdir(parents=True)
    (root / "vllm/__init__.py").touch()
    for module, classes in bodies.items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [*classes.pop("", [])]
        lines += (line for owner, body in classes.items() for line in (f"class {owner}:", *(f"    {b}" for b in body)))
        path.write_text("\n".join(lines) + "\n")
    return root / "vllm"


def test_a_package_that_has_the_table_lacks_nothing(tmp_path: Path) -> None:
    assert lacking(written(tmp_path)) == []


@pytest.mark.parametrize("hook", ALL_HOOKS, ids=lambda hook: hook.name)
def test_a_renamed_hook_is_named(tmp_path: Path, hook: Hook) -> None:
    hooks = [replace(h, function=f"{h.function}_v2") if h is hook else h for h in ALL_HOOKS]
    (moved,) = lacking(written(tmp_path, hooks))
    assert (moved.entry, moved.what) == (hook, "it is gone")


@pytest.mark.parametrize("hook", [hook for hook in ALL_HOOKS if hook.parameters], ids=lambda hook: hook.name)
def test_a_moved_parameter_is_named(tmp_path: Path, hook: Hook) -> None:
    hooks = [replace(h, parameters=("first", *h.parameters)) if h is hook else h for h in ALL_HOOKS]
    (moved,) = lacking(written(tmp_path, hooks))
    assert (moved.entry, moved.what) == (hook, f"its parameters are now first, {', '.join(hook.parameters)}, more")


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_a_name_that_is_gone_is_named(tmp_path: Path, name: Name) -> None:
    (moved,) = lacking(written(tmp_path, names=[n for n in NAMES if n is not name] + [replace(name, attribute="x")]))
    assert (moved.entry, moved.what) == (name, "it is gone")


def test_a_class_and_a_module_that_are_gone_are_named(tmp_path: Path) -> None:
    package = written(tmp_path, (hook for hook in ALL_HOOKS if hook.name != "create_engine_config"))
    (moved,) = lacking(package)
    assert moved.what == "vllm.engine.arg_utils.EngineArgs is gone"
    scheduler = written(tmp_path / "other", ALL_HOOKS, (name for name in NAMES if name.owner != "PrefillStats"))
    assert [moved.what for moved in lacking(scheduler)] == 3 * ["vllm.v1.metrics.stats.PrefillStats is gone"]


def test_a_package_without_its_source_is_not_judged(tmp_path: Path) -> None:
    assert lacking(tmp_path) == []


@pytest.mark.parametrize("version", ["0.32.0", "0.99.0"])
def test_a_release_that_was_not_checked_is_looked_at_when_the_plugin_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """One line says what it lacks and what the traces will miss; the hooks that are there work."""
    package = written(tmp_path, names=(name for name in NAMES if name.attribute not in ("lora_request", "get_blocks")))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "__file__", str(package / "__init__.py"), raising=False)
    monkeypatch.setattr(plugin, "_installed", [])
    monkeypatch.setattr(plugin, "_version", lambda: version)
    monkeypatch.setattr(plugin, "check", lambda: ({}, []))
    plugin.install()
    if version == "0.32.0":
        assert caplog.text == ""
    else:
        (record,) = caplog.records
        assert "vllm.v1.request.Request.lora_request (it is gone)" in record.getMessage()
        assert record.getMessage().endswith("Missing therefore: LoRA adapter; blocks of a KV load")
