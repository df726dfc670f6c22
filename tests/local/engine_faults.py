"""A vLLM plugin for tests: makes functions of llmtrace.engine raise in a running server.

The file named by LLMTRACE_TEST_FAULT says what shall happen now: an object of JSON with ``run``, a number that grows,
``place``, the name of a function that the plugin runs under its guard, and ``moment``: whether it raises ``before`` or
``after`` it has done its work. With a new ``run`` a process that was switched off is on again, as after a restart. With
LLMTRACE_TEST_FAULT_INSTALL set, the plugin cannot be installed in child processes: the engine core and its worker.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

FILE, INSTALL = "LLMTRACE_TEST_FAULT", "LLMTRACE_TEST_FAULT_INSTALL"
SECRET = "the prompt was: secret"


def register() -> None:
    """Called by vLLM in each process, perhaps more than once."""
    from llmtrace.engine import plugin
    from llmtrace.engine.hooks import Guard

    if isinstance(vars(Guard).get("on"), property):
        return
    run = Guard.run

    def faulty_run(guard: Any, where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        order = _order()
        if function.__name__ != order["place"]:
            return run(guard, where, function, *args, **kwargs)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if order["moment"] == "after":
                function(*args, **kwargs)
            raise RuntimeError(SECRET)

        return run(guard, where, faulty, *args, **kwargs)

    Guard.run = faulty_run  # type: ignore[method-assign]
    Guard.on = property(_is_on, _set_on)  # type: ignore[assignment]
    if os.environ.get(INSTALL) and multiprocessing.parent_process() is not None:
        plugin.check = _cannot_check  # type: ignore[assignment]


def _order() -> dict[str, Any]:
    order: dict[str, Any] = json.loads(Path(os.environ[FILE]).read_text())
    return order


def _is_on(guard: Any) -> bool:
    off = vars(guard).get("_off_since")
    if off is not None and _order()["run"] > off[0]:
        guard._cleanups, guard._off_since = off[1], None
        return True
    return off is None


def _set_on(guard: Any, on: bool) -> None:
    guard._off_since = None if on else (_order()["run"], list(guard._cleanups))


def _cannot_check() -> None:
    raise RuntimeError(SECRET)
