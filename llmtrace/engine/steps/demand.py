"""Steps on demand: a traced request has become slow, and a window of steps without gaps is traced on all ranks.

The engine core's loop only asks, and looks at the window. With one engine the window begins at the next step, or as
soon as the budget allows it. Several engines have to mean the same steps, which they cannot say to each other in their
loops: a thread of each looks into the store that they share (:class:`Agreement`), and puts down a window when all have
promised it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmtrace.engine.facts import MAX_STEPS, asks_for_steps
from llmtrace.engine.hooks import Guard, logger
from llmtrace.engine.steps.ids import number_of

SLOW_VARIABLE = "LLMTRACE_STEP_SLOW_MS"
"""A traced request that waits longer for a token is slow; 0 switches steps on demand off. The same on all ranks."""
SLOW_DEFAULT = 1000
BUDGET_VARIABLE = "LLMTRACE_STEP_SLOW_BUDGET"
"""Steps on demand in a minute; 0 switches them off. The same on all ranks."""
BUDGET_DEFAULT = 64
WINDOW = MAX_STEPS
"""Steps in a window: as many as a request links to."""
NONE = range(0)
TICK_S = 0.1
"""Between two looks into the store."""
AHEAD_TICKS = 10
"""How far ahead a window is proposed."""
PACE_TICKS = 100
"""Over which the fastest tick counts."""
_KEY = "llmtrace/step-window"


class Counter(Protocol):
    """The engine's steps."""

    number: int
    window: range
    group: str


class Demand:
    """What one engine asks for, and gets. ``engines`` are all that step together."""

    def __init__(self, steps: Counter, engines: int, environment: Mapping[str, str] = os.environ) -> None:
        self._steps = steps
        self._engines = engines
        self._guard = Guard("steps on demand")
        self._guard.on_off(self.forget)
        slow = number_of(environment, SLOW_VARIABLE, SLOW_DEFAULT)
        budget = number_of(environment, BUDGET_VARIABLE, BUDGET_DEFAULT)
        self.on = slow > 0 and budget > 0
        self.slow_s = slow / 1000 if self.on else float("inf")
        """Seconds without a token after which a request is slow."""
        self._pause_s = 60 * WINDOW / budget if self.on else 0.0
        self._free_at = 0.0
        """When the budget allows the next window (monotonic s)."""
        self._asking: Any = None
        """A slow request for which there was no window yet."""
        self.pending = False
        """With one engine: there is such a request, so each step has to :meth:`decide`."""
        self._told = NONE
        """The window of which the workers know."""
        self._store: Any = None
        self._agreement: Agreement | None = None

    def join(self, store: Any) -> None:
        """Agree with the other engines from now on; ``store`` is torch's, which they share."""
        if self.on:
            self._store = store
            threading.Thread(
                target=_watch, args=(weakref.ref(self),), name="llmtrace-steps-on-demand", daemon=True
            ).start()

    def admitted(self, request: Any) -> None:
        """``request`` has its first step; its caller may want the next ones traced."""
        if self.on and self._guard.on:
            self._guard.run("reading what a caller wants", self._admitted, request)

    def _admitted(self, request: Any) -> None:
        if asks_for_steps(request.trace_headers):
            self.ask(request)

    def ask(self, request: Any) -> None:
        """``request`` is slow, and asks until it has a window or is over. Returns at once."""
        if self.on and self._guard.on:
            self._asking = request
            if self._engines == 1:
                self.decide()

    def decide(self) -> None:
        """With one engine: open a window at the next step, if somebody asks for one and the budget allows it."""
        self._guard.run("opening a window of steps", self._decide)

    def _decide(self) -> None:
        number = self._steps.number
        if self._wants(number):
            self._open(range(number + 1, number + 1 + WINDOW))
        self.pending = self._asking is not None

    def tell(self, engine: Any) -> None:
        """Workers decide by themselves on passes without requests: let those of ``engine`` know of the window, once."""
        if self._steps.window is not self._told:
            self._told = self._steps.window
            self._guard.run("telling workers of steps on demand", self._tell, engine)

    def _tell(self, engine: Any) -> None:
        engine.model_executor.collective_rpc(hear, args=(self._steps.group, self._told.start, self._told.stop))

    def look(self) -> bool:
        """Look once into the store; whether to do so again."""
        self._guard.run("agreeing on steps", self._look)
        return self._guard.on

    def _look(self) -> None:
        if self._agreement is None:
            self._agreement = Agreement(self._store, self._engines)
        number = self._steps.number
        window = self._agreement.look(number, self._wants(number))
        if window is None:
            return
        self._open(window)
        if self._steps.number >= window.start:
            self._steps.window = NONE
            logger.warning("llmtrace: %s lack ranks of this engine, which learnt too late", _named(window))

    def _wants(self, number: int) -> bool:
        asking = self._asking
        if asking is not None and asking.is_finished():
            self._asking = asking = None
        return asking is not None and self._is_free(number)

    def _is_free(self, number: int) -> bool:
        return number >= self._steps.window.stop - 1 and time.monotonic() >= self._free_at

    def _open(self, window: range) -> None:
        self._steps.window = window
        self._free_at = time.monotonic() + self._pause_s
        self._asking = None

    def forget(self) -> None:
        """Let go of whoever asks, and of the window."""
        self._asking = None
        self.pending = False
        self._steps.window = NONE


def _watch(watched: weakref.ref[Demand]) -> None:
    while (demand := watched()) is not None and demand.look():
        del demand  # between two looks this thread keeps no engine alive
        time.sleep(TICK_S)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A window that somebody proposed when it was at step ``made``."""

    made: int
    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Proposal:
        """What :meth:`__str__` gave."""
        return cls(*map(int, text.split()))

    def __str__(self) -> str:
        return f"{self.made} {self.start} {self.stop}"

    @property
    def window(self) -> range:
        """Its steps."""
        return range(self.start, self.stop)

    @property
    def deadline(self) -> int:
        """The step before which it has to be promised: the way from there to the start is left for all to see that."""
        return (self.made + self.start) // 2

    @property
    def promises(self) -> str:
        """Key in the store of how many engines promised it."""
        return f"{_KEY}/{self}"


class Agreement:
    """One engine's part in agreeing on windows with the others, over ``store``.

    Engines that step together have the same numbers, give or take a step, but hear of a proposal at different times.
    So a window is proposed some time ahead; each engine promises it that has not passed half of the way; and it holds
    once all have promised. One that does not answer in time makes it fall for all, and none traces a part of it.
    """

    def __init__(self, store: Any, engines: int) -> None:
        self._store = store.clone()  # a connection of its own: vLLM's use of the store never waits for this one
        self._engines = engines
        self._heard = ""
        self._pending: Proposal | None = None
        self._number = 0
        self._paces: deque[int] = deque(maxlen=PACE_TICKS)
        """Steps from look to look."""
        self._fell = False

    def look(self, number: int, wanted: bool) -> range | None:
        """Called every TICK_S, at step ``number``: a window that all have promised just now.

        ``wanted``: propose one, if nobody else did.
        """
        steps, self._number = number - self._number, number
        if not steps:
            return None  # nothing runs; and when all is over, there may be no store
        self._paces.append(steps)
        if self._pending is not None and number >= self._pending.start:
            self._fall(self._pending)
        if self._pending is None:
            self._pending = self._hear(number, wanted)
        pending = self._pending
        if pending is None or int(self._store.add(pending.promises, 0)) < self._engines:
            return None
        self._pending = None
        return pending.window

    def _hear(self, number: int, wanted: bool) -> Proposal | None:
        """One call for both: the newest proposal there is, or, if that is known already, an own one."""
        start = number + AHEAD_TICKS * max(self._paces)
        own = str(Proposal(number, start, start + WINDOW)) if wanted else self._heard
        found = self._store.compare_set(_KEY, self._heard, own)
        found = found.decode() if isinstance(found, bytes) else str(found)
        if found == self._heard:
            return None
        if found == own and self._heard:
            self._store.delete_key(Proposal.parse(self._heard).promises)
        self._heard = found
        proposal = Proposal.parse(found)
        if number >= proposal.deadline:
            self._fall(proposal)
            return None
        self._store.add(proposal.promises, 1)
        return proposal

    def _fall(self, proposal: Proposal) -> None:
        self._pending = None
        if not self._fell:
            self._fell = True
            logger.info(
                "llmtrace: %s are not traced on demand: not every engine promised them in time (said once)",
                _named(proposal.window),
            )


def _named(window: range) -> str:
    return f"steps {window.start} to {window.stop - 1}"


class _Heard:
    """What the engine core told the worker of this process."""

    def __init__(self) -> None:
        self.group = ""
        self.window = NONE


heard = _Heard()


def hear(_worker: Any, group: str, start: int, stop: int) -> None:
    """Runs in each worker's process, called by the engine core: before its loop, and in a window without requests."""
    heard.group, heard.window = group, range(start, stop)
