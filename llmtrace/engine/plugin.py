"""Puts the plugin into a vLLM process: which wrapped function calls what."""

from __future__ import annotations

import importlib
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmtrace.engine.collector import Collector
from llmtrace.engine.compat import HOOKS, NAMES, Moved, check, is_checked, owner_of
from llmtrace.engine.frontend import Frontend
from llmtrace.engine.hooks import After, Before, Guard, logger, wrap
from llmtrace.engine.steps import ids
from llmtrace.engine.switch import switch_on

_COLLECTOR = "_llmtrace_collector"
_installed: list[Plugin] = []
_ALL_NEEDED = ("add_request", "schedule", "update_from_output", "do_tracing")
"""Without one of these there is nothing to show; the others only take some of it away."""


class Plugin:
    """The bodies of the hooks. Each runs under a guard, with the wrapped function's own arguments.

    Steps have a guard of their own: a fault in them takes away no request's spans.
    """

    def __init__(self, guard: Guard | None = None, frontend: Frontend | None = None) -> None:
        self.guard = guard or Guard()
        self.steps = Guard("spans of steps")
        self.frontend = frontend or Frontend(self.guard)
        self.guard.on_off(self.frontend.clear)

    def bodies(self) -> dict[str, tuple[Before | None, After | None]]:
        """For each hook what runs before and after the function."""
        return {
            "add_request": (self._adding, self._added),
            "schedule": (self._scheduling, self._scheduled),
            "update_from_output": (self._updating, self._updated),
            "finish_requests": (self._finishing, self._finished),
            "do_tracing": (self._tracing, self._traced),
            "process_outputs": (self._processing, None),
            "create_engine_config": (None, self._configured),
        }

    def step_bodies(self) -> dict[str, tuple[Before | None, After | None]]:
        """The same of the hooks that are there for steps."""
        return {
            "engine_loop": (self._joining, None),
            "engine_dummy_batch": (self._dummy, None),
            "init_device": (None, self._device_ready),
        }

    def _collector(self, scheduler: Any) -> Collector:
        collector: Collector | None = getattr(scheduler, _COLLECTOR, None)
        if collector is None:
            batches = self.steps.run("setting up steps", _batches, scheduler, self.steps)
            collector = Collector(scheduler, batches)
            setattr(scheduler, _COLLECTOR, collector)
            self.guard.on_off(_weakly(collector.clear))
            self.steps.on_off(_weakly(collector.clear_steps))
        return collector

    def _adding(self, scheduler: Any, request: Any, *_args: Any, **_kwargs: Any) -> int | None:
        return self._collector(scheduler).waiting_count(request)

    def _added(
        self, position: int | None, _result: Any, scheduler: Any, request: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        self._collector(scheduler).added(request, position)

    def _scheduling(self, _scheduler: Any, *_args: Any, **_kwargs: Any) -> float:
        return time.monotonic()

    def _scheduled(self, began: float, output: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        self._collector(scheduler).scheduled(output, began)

    def _updating(
        self, scheduler: Any, scheduler_output: Any, model_runner_output: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        self._collector(scheduler).stepped(scheduler_output, model_runner_output)

    def _updated(self, _state: None, result: dict[int, Any], scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        self._collector(scheduler).updated(result)

    def _finishing(
        self, _scheduler: Any, request_ids: str | Iterable[str] | None, *_args: Any, **_kwargs: Any
    ) -> str | list[str] | None:
        # An iterator can be read only once, and vLLM needs it: then every request is looked at.
        if request_ids is None or isinstance(request_ids, str):
            return request_ids
        return list(request_ids) if isinstance(request_ids, (list, tuple, set, frozenset)) else None

    def _finished(self, ids: str | list[str] | None, _result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        self._collector(scheduler).ended(ids)

    def _tracing(
        self, _processor: Any, engine_core_output: Any, req_state: Any, *_args: Any, **_kwargs: Any
    ) -> tuple[Any, Any]:
        self.frontend.tracing(engine_core_output, req_state)
        return engine_core_output, req_state

    def _traced(self, state: tuple[Any, Any], _result: Any, *_args: Any, **_kwargs: Any) -> None:
        self.frontend.traced(*state)

    def _processing(self, processor: Any, engine_core_outputs: list[Any], *_args: Any, **_kwargs: Any) -> None:
        self.frontend.receive(engine_core_outputs, processor.request_states)

    def _configured(self, _state: None, config: Any, arguments: Any, *_args: Any, **_kwargs: Any) -> None:
        switch_on(config, log_stats=not getattr(arguments, "disable_log_stats", False))

    def _joining(self, engine: Any, *_args: Any, **_kwargs: Any) -> None:
        batches = self._collector(engine.scheduler).batches
        if batches is not None:
            batches.join(engine)

    def _dummy(self, engine: Any, *_args: Any, **_kwargs: Any) -> None:
        batches = self._collector(engine.scheduler).batches
        if batches is not None:
            batches.dummy(engine)

    def _device_ready(self, _state: None, _result: Any, wrapper: Any, *_args: Any, **_kwargs: Any) -> None:
        if ids.are_traced(wrapper.vllm_config):
            from llmtrace.engine.steps.worker import install_steps

            install_steps(wrapper.worker, wrapper.vllm_config)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Neither a guard nor the plugin shall keep a scheduler alive."""
    reference = weakref.WeakMethod(method)
    return lambda: found() if (found := reference()) else None


def _batches(scheduler: Any, guard: Guard) -> Any:
    if not ids.are_traced(scheduler.vllm_config):
        return None
    from llmtrace.engine.steps.batch import Batches

    return Batches(scheduler, guard)


def install() -> None:
    """Wrap what this vLLM has of the table; say once what it lacks. A second call in a process does nothing."""
    if _installed:
        return
    plugin = Plugin()
    _installed.append(plugin)
    found, moved = check()
    version = _version()
    report(version, [*moved, *_names_gone(version)])
    if any(name not in found for name in _ALL_NEEDED):
        return
    _wrap_all(plugin, found)


def _wrap_all(plugin: Plugin, found: dict[str, Callable[..., object]]) -> None:
    steps = plugin.step_bodies()
    bodies = plugin.bodies() | steps
    for hook in HOOKS:
        if hook.name in found:
            guard = plugin.steps if hook.name in steps else plugin.guard
            wrap(owner_of(hook), hook.function, guard, *bodies[hook.name])


def report(version: str, moved: list[Moved]) -> None:
    """One line where something is missing, or where this vLLM is not one that was checked."""
    if moved:
        gone = "; ".join(f"{item.entry.path} ({item.what})" for item in moved)
        lost = sorted({item.entry.without for item in moved})
        logger.warning("llmtrace: vLLM %s lacks %s. Missing therefore: %s", version, gone, "; ".join(lost))
    elif not is_checked(version):
        logger.info(
            "llmtrace: vLLM %s is newer or older than those that llmtrace was checked with; all that it uses is there",
            version,
        )


def _names_gone(version: str) -> list[Moved]:
    """What is read of vLLM's objects and is not in this version's source; of the checked ones it is known to be."""
    if is_checked(version):
        return []
    from llmtrace.engine.source import lacking

    package = importlib.import_module("vllm").__file__
    return lacking(Path(package).parent, NAMES) if package else []


def _version() -> str:
    return str(getattr(importlib.import_module("vllm.version"), "__version__", "unknown"))
