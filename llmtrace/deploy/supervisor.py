"""Talk to the stack's supervisord over its unix socket."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
from supervisor.xmlrpc import SupervisorTransport

from llmtrace.errors import UserError

CALL_TIMEOUT_S = 60
ORPHANS_TIMEOUT_S = 40
AUTOGROUP_NICE = 10
ENVIRONMENT = frozenset(
    [
        "HOME",
        "PATH",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_STATE_HOME",
        "XDG_RUNTIME_DIR",
    ]
)
"""What the processes see of the caller's environment: no secrets, no proxies, no stray OTEL_* variables."""
DOWN = frozenset({"STOPPED", "EXITED", "FATAL"})
"""States of a process that does not run, and is not about to."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CALL_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CALL_TIMEOUT_S)
        self.sock.connect(str(self._path))


class _Transport(SupervisorTransport):  # type: ignore[misc]
    """Supervisor's transport, with a timeout."""

    def __init__(self, path: Path) -> None:
        super().__init__(None, None, f"unix://{path}")
        self._get_connection = lambda: _UnixConnection(path)


def _give_way(pid: int) -> None:
    """Let the stack's session yield the CPU to others (Linux autogroups, sched(7)).

    A session whose model servers use every core keeps those of other sessions, such as the scenario driver's, from
    running for up to seconds. Where the kernel has no autogroups there is nothing to do.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(AUTOGROUP_NICE))


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


def _stop(processes: list[psutil.Process], timeout_s: float) -> bool:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout_s / 2)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout_s / 2)
    if alive:
        names = ", ".join(str(process.pid) for process in alive)
        raise UserError(f"the processes {names} did not end within {timeout_s:g} s: stop them yourself")
    return bool(processes)


@dataclass(frozen=True)
class Process:
    """A supervised process; ``state`` is supervisord's (RUNNING, STARTING, BACKOFF, FATAL, STOPPED, ...)."""

    name: str
    state: str
    pid: int
    uptime_s: int
    log: Path


@dataclass(frozen=True)
class Update:
    """Process names by what an update does to them."""

    added: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        parts = (("started", self.added), ("restarted", self.changed), ("stopped", self.removed))
        return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names) or "nothing to do"


class Supervisor:
    """A supervisord by its unix socket; calls raise UserError where it does not answer."""

    def __init__(self, path: Path) -> None:
        self.socket = path

    def _call(self, method: str, *arguments: object) -> Any:
        # A transport whose connection failed once stays unusable, so each call has its own.
        transport = _Transport(self.socket)
        try:
            with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise UserError(f"supervisord refused {method}{arguments}: {fault.faultString}") from None
        except TimeoutError:
            raise UserError(
                f"supervisord has not answered {method} on {self.socket} within {CALL_TIMEOUT_S} s: see its log"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"No supervisord answers on {self.socket} ({error or type(error).__name__}): run `llmtrace up`"
            ) from None

    def pid(self) -> int | None:
        """Process id of supervisord; None where none answers."""
        try:
            return cast("int", self._call("getPID"))
        except UserError:
            return None

    def launch(self, conf: Path, timeout_s: float = 20) -> None:
        """Start supervisord with ``conf`` as a daemon and wait until it answers; stop what a killed one left before.

        Raises UserError with supervisord's own words where it refuses its configuration.
        """
        _stop(self.orphans(), ORPHANS_TIMEOUT_S)
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf)]
        environment = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"supervisord did not start with {conf} within {timeout_s:g} s") from None
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise UserError(f"supervisord did not start with {conf}: {words[-1] if words else 'no output'}")
        deadline = time.monotonic() + timeout_s
        while self.pid() is None:
            if time.monotonic() > deadline:
                raise UserError(f"supervisord did not answer on {self.socket} within {timeout_s:g} s")
            time.sleep(0.1)
        _give_way(cast("int", self.pid()))

    def processes(self) -> list[Process]:
        """All processes, in supervisord's order."""
        return [
            Process(
                name=info["name"],
                state=info["statename"],
                pid=info["pid"],
                uptime_s=info["now"] - info["start"] if info["pid"] else 0,
                log=Path(info["stdout_logfile"]),
            )
            for info in self._call("getAllProcessInfo")
        ]

    def pending(self) -> Update:
        """What an update would do, by the configuration files on disk."""
        ((added, changed, removed),) = self._call("reloadConfig")
        return Update(added, changed, removed)

    def update(self) -> Update:
        """Start, restart and stop exactly the processes whose configuration changed."""
        update = self.pending()
        for name in (*update.changed, *update.removed):
            self._call("stopProcessGroup", name)
            self._call("removeProcessGroup", name)
        for name in (*update.changed, *update.added):
            self._call("addProcessGroup", name)
        return update

    def down(self) -> list[str]:
        """Names of the processes that are stopped or gave up, and should run; one without autostart may rest."""
        resting = {info["name"] for info in self._call("getAllConfigInfo") if not info["autostart"]}
        return [p.name for p in self.processes() if p.state in DOWN and p.name not in resting]

    def revive(self) -> list[str]:
        """Start processes that are stopped or gave up; return their names."""
        down = self.down()
        for name in down:
            self._call("startProcess", name, False)
        return down

    def process(self, name: str) -> Process:
        """The process of this name; raises UserError where there is none."""
        found = next((p for p in self.processes() if p.name == name), None)
        if found is None:
            raise UserError(f"supervisord knows no process {name}: run `llmtrace up`")
        return found

    def start(self, name: str) -> None:
        """Start one process, if it does not run already; does not wait for it."""
        if self.process(name).state in DOWN:
            self._call("startProcess", name, False)

    def stop(self, name: str) -> None:
        """Stop one process, if it runs, and wait for its end."""
        if self.process(name).state not in DOWN:
            self._call("stopProcess", name)

    def restart(self, name: str) -> None:
        """Stop and start one process."""
        self._call("stopProcess", name)
        self._call("startProcess", name)

    def orphans(self) -> list[psutil.Process]:
        """Processes that a supervisord of this socket started and left behind: it was killed itself."""
        if self.pid() is not None:
            return []
        url = f"unix://{self.socket}"
        return [
            process for process in psutil.process_iter() if _environment(process).get("SUPERVISOR_SERVER_URL") == url
        ]

    def shutdown(self, timeout_s: float = 60) -> bool:
        """Stop all processes and supervisord itself, and what a killed one left; return whether there was anything."""
        pid = self.pid()
        if pid is None:
            return _stop(self.orphans(), timeout_s)
        self._call("shutdown")
        # It answers nothing while it stops its processes, and ends after the last one.
        try:
            psutil.Process(pid).wait(timeout_s)
        except psutil.NoSuchProcess:
            pass
        except psutil.TimeoutExpired:
            raise UserError(
                f"supervisord (process {pid}) did not stop its processes within {timeout_s:g} s: "
                f"see its log, and stop process {pid} yourself"
            ) from None
        return True
