"""What of llmtrace.engine's table a vLLM lacks, by its source, which need not run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from llmtrace.engine.compat import HOOKS, NAMES, STEP_HOOKS, Hook, Name


def lacking(vllm: Path, hooks: Sequence[Hook] = (*HOOKS, *STEP_HOOKS), names: Sequence[Name] = NAMES) -> list[str]:
    """A sentence for each entry of the table that the package ``vllm`` does not have, or has changed."""
    found = [*(_fault_of_hook(vllm, hook) for hook in hooks), *(_fault_of_name(vllm, name) for name in names)]
    return [fault for fault in found if fault]


def class_of(vllm: Path, module: str, owner: str) -> ast.ClassDef | None:
    """The class ``owner`` of a module; None where either is not there."""
    return next((node for node in _tree(vllm, module) if isinstance(node, ast.ClassDef) and node.name == owner), None)


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
    for inner in ast.walk(owner):
        match inner:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def _fault_of_hook(vllm: Path, hook: Hook) -> str:
    owner = class_of(vllm, hook.module, hook.owner) if hook.owner else None
    if hook.owner and owner is None:
        return f"{hook.module}.{hook.owner} is gone: without it {hook.without}"
    body = owner.body if owner else _tree(vllm, hook.module)
    functions = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == hook.function)
    function = next(functions, None)
    if function is None:
        return f"{hook.path} is gone: without it {hook.without}"
    parameters = tuple(argument.arg for argument in function.args.args[1 if hook.owner else 0 :])
    if parameters[: len(hook.parameters)] != hook.parameters:
        return f"{hook.path} takes ({', '.join(parameters)}), not ({', '.join(hook.parameters)}) first"
    return ""


def _fault_of_name(vllm: Path, name: Name) -> str:
    owner = class_of(vllm, name.module, name.owner)
    if owner is None:
        return f"{name.module}.{name.owner} is gone ({name.reason})"
    return "" if name.attribute in attributes(owner) else f"{name.path} is gone ({name.reason})"


@cache
def _tree(vllm: Path, module: str) -> list[ast.stmt]:
    base = vllm.parent / Path(*module.split("."))
    path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
    return [] if path is None else ast.parse(path.read_text(encoding="utf-8")).body
