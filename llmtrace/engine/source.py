"""What of the table of :mod:`llmtrace.engine.compat` a vLLM lacks, by its source, which need not run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from llmtrace.engine.compat import HOOKS, NAMES, STEP_HOOKS, Hook, Moved, Name


def lacking(vllm: Path, entries: Sequence[Hook | Name] = (*HOOKS, *STEP_HOOKS, *NAMES)) -> list[Moved]:
    """The entries that the package ``vllm`` does not have, or has changed; none where it comes without its source."""
    if not (vllm / "__init__.py").exists():
        return []
    found = [(entry, _fault(vllm, entry)) for entry in entries]
    _tree.cache_clear()  # tens of megabytes
    return [Moved(entry, fault) for entry, fault in found if fault]


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


def _fault(vllm: Path, entry: Hook | Name) -> str:
    owner = class_of(vllm, entry.module, entry.owner) if entry.owner else None
    if entry.owner and owner is None:
        return f"{entry.module}.{entry.owner} is gone"
    if isinstance(entry, Hook):
        return _fault_of_hook(owner.body if owner else _tree(vllm, entry.module), entry)
    return "" if owner is not None and entry.attribute in attributes(owner) else "it is gone"


def _fault_of_hook(body: list[ast.stmt], hook: Hook) -> str:
    functions = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == hook.function)
    function = next(functions, None)
    if function is None:
        return "it is gone"
    parameters = tuple(argument.arg for argument in function.args.args[1 if hook.owner else 0 :])
    if parameters[: len(hook.parameters)] != hook.parameters:
        return f"its parameters are now {', '.join(parameters)}"
    return ""


@cache
def _tree(vllm: Path, module: str) -> list[ast.stmt]:
    base = vllm.parent / Path(*module.split("."))
    path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
    return [] if path is None else ast.parse(path.read_text(encoding="utf-8")).body
