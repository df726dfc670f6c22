"""Can the local stack run here? Each check gives one sentence, with the remedy where it fails."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llmtrace.deploy.supervisor import Supervisor
from llmtrace.deploy.topology import AUTOSCALED, ModelServer, known_scenario, model_servers, whole_number
from llmtrace.errors import UserError

GIB = 1 << 30
MACHINES = ("x86_64", "aarch64")
# A unix socket's path is limited to 108 bytes, and supervisord binds it under a longer temporary name first.
SOCKET_PATH_LIMIT = 90


@dataclass(frozen=True)
class Port:
    """A TCP port on 127.0.0.1 that the stack wants: what for, and the inventory variable that sets it."""

    number: int
    purpose: str
    variable: str


@dataclass(frozen=True)
class Holder:
    """Who listens on a port: process id and name; both None where the system does not tell."""

    pid: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Requirements:
    """What a stack needs. Memory and disk in bytes; ``disk`` maps a folder to what must be free there."""

    ports: tuple[Port, ...]
    memory: int
    disk: Mapping[Path, int]
    cache_dir: Path
    run_dir: Path


@dataclass(frozen=True)
class Facts:
    """What was found on the machine. Memory and disk in bytes."""

    system: str
    machine: str
    python: tuple[int, int]
    memory_available: int
    disk_free: Mapping[Path, int]
    busy: Mapping[int, Holder] = field(default_factory=dict)
    own_pids: frozenset[int] = frozenset()
    partial_installs: tuple[Path, ...] = ()

    @property
    def running(self) -> bool:
        """Whether the stack of this run directory is up."""
        return bool(self.own_pids)


@dataclass(frozen=True)
class Check:
    """Outcome of one check: one sentence, with the remedy where ``ok`` is false."""

    name: str
    ok: bool
    message: str


def existing_parent(path: Path) -> Path:
    """The nearest existing folder at or above ``path``."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _holder(port: int) -> Holder | None:
    """Who listens on 127.0.0.1:``port``; None where nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            pass
        else:
            return None
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return Holder()
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        if listens and connection.pid:
            try:
                return Holder(connection.pid, psutil.Process(connection.pid).name())
            except psutil.Error:
                return Holder(connection.pid)
    return Holder()


def _own_pids(run_dir: Path) -> frozenset[int]:
    supervisor = Supervisor(run_dir / "supervisor.sock")
    pid = supervisor.pid()
    if pid is None:
        # What a killed supervisord left behind is stopped by the next start.
        return frozenset(process.pid for process in supervisor.orphans())
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return frozenset({pid})
    return frozenset({pid, *(child.pid for child in children)})


def gather(requirements: Requirements) -> Facts:
    """Look at this machine."""
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        python=sys.version_info[:2],
        memory_available=psutil.virtual_memory().available,
        disk_free={folder: psutil.disk_usage(str(existing_parent(folder))).free for folder in requirements.disk},
        busy={port.number: holder for port in requirements.ports if (holder := _holder(port.number)) is not None},
        own_pids=_own_pids(requirements.run_dir),
        partial_installs=tuple(sorted(requirements.cache_dir.glob("*/*.partial"))),
    )


def check_platform(facts: Facts) -> Check:
    """Linux on x86_64 or aarch64."""
    if facts.system == "Linux" and facts.machine in MACHINES:
        return Check("platform", True, f"{facts.system} {facts.machine}")
    return Check(
        "platform",
        False,
        f"The local profile runs on Linux ({' or '.join(MACHINES)}), and this is "
        f"{facts.system} {facts.machine}: use a Linux machine or virtual machine.",
    )


def check_python(facts: Facts) -> Check:
    """Python 3.11 or newer."""
    version = ".".join(map(str, facts.python))
    if facts.python >= (3, 11):
        return Check("python", True, f"Python {version}")
    return Check("python", False, f"Python {version} is too old: install Python 3.11 or newer, then make .venv again.")


def check_memory(facts: Facts, requirements: Requirements) -> Check:
    """Memory for the model servers, unless the stack already has it."""
    available = facts.memory_available / GIB
    if facts.running:
        return Check("memory", True, f"the stack is running, {available:.1f} GiB more are available")
    if facts.memory_available >= requirements.memory:
        return Check("memory", True, f"{available:.1f} GiB available")
    return Check(
        "memory",
        False,
        f"The stack needs {requirements.memory / GIB:.1f} GiB of memory and {available:.1f} GiB are "
        "available: stop other programs, or lower vllm_servers (each server takes about 3 GiB).",
    )


def check_disk(facts: Facts, requirements: Requirements) -> list[Check]:
    """Space in the cache and state folders."""
    checks = []
    for folder, needed in requirements.disk.items():
        free = facts.disk_free[folder]
        if free >= needed:
            checks.append(Check("disk", True, f"{free / GIB:.1f} GiB free for {folder}"))
            continue
        checks.append(
            Check(
                "disk",
                False,
                f"{folder} needs {needed / GIB:.1f} GiB of free disk space and {free / GIB:.1f} GiB are "
                "free: free some space, or choose another place with XDG_CACHE_HOME or XDG_STATE_HOME.",
            )
        )
    return checks


def check_ports(facts: Facts, requirements: Requirements) -> list[Check]:
    """Every port is free, or held by this very stack; two uses of one port count as busy."""
    failed = []
    first_use: dict[int, Port] = {}
    for port in requirements.ports:
        other = first_use.setdefault(port.number, port)
        if other is not port:
            failed.append(
                Check(
                    "ports",
                    False,
                    f"Port {port.number} is given to both the {other.purpose} and the {port.purpose}: "
                    f"change {port.variable}.",
                )
            )
        holder = facts.busy.get(port.number)
        if holder is None or holder.pid in facts.own_pids:
            continue
        who = f"process {holder.pid} ({holder.name or 'name unknown'})" if holder.pid else "another process"
        failed.append(
            Check(
                "ports",
                False,
                f"Port {port.number} for the {port.purpose} is held by {who}: stop it, or change {port.variable}.",
            )
        )
    return failed or [Check("ports", True, f"{len(requirements.ports)} ports on 127.0.0.1 are free or our own")]


def check_installs(facts: Facts) -> Check:
    """Half-finished installs in the cache; they are not fatal, since the playbook starts them afresh."""
    if not facts.partial_installs:
        return Check("installs", True, "no half-finished install in the cache")
    names = ", ".join(f"{path.parent.name} {path.name.removesuffix('.partial')}" for path in facts.partial_installs)
    return Check(
        "installs",
        False,
        f"The install of {names} was interrupted: run `llmtrace up`, which removes and repeats it.",
    )


def check_run_dir(requirements: Requirements) -> Check:
    """The supervisor's socket fits the system's limit on socket paths."""
    path = str(requirements.run_dir / "supervisor.sock")
    if len(path.encode()) <= SOCKET_PATH_LIMIT:
        return Check("run_dir", True, path)
    return Check(
        "run_dir",
        False,
        f"{path} is longer than the {SOCKET_PATH_LIMIT} bytes that a socket path may have: "
        "set llmtrace_run_dir to a shorter path.",
    )


def check(facts: Facts, requirements: Requirements) -> list[Check]:
    """Run all checks."""
    return [
        check_platform(facts),
        check_python(facts),
        check_memory(facts, requirements),
        *check_disk(facts, requirements),
        *check_ports(facts, requirements),
        check_installs(facts),
        check_run_dir(requirements),
    ]


def ports_of(variables: Mapping[str, object]) -> tuple[Port, ...]:
    """The ports of an inventory's variables (playbooks/inventories/local/group_vars/all.yml), as its scenario has them.

    Raises UserError for a port that is none.
    """
    scenario = known_scenario(variables["scenario"])
    ports = [
        *_ports(_of(variables, "gateway_ports", scenario), "gateway {}", f"gateway_ports.{scenario}.{{}}"),
        *(
            port
            for arm, numbers in _of(variables, "picker_ports", scenario).items()
            for port in _ports(numbers, f"{arm} picker's {{}}", f"picker_ports.{scenario}.{arm}.{{}}")
        ),
        *(port for server in model_servers(variables) for port in _server_ports(server)),
    ]
    for variable, purpose in (
        ("envoy_admin_port", "Envoy admin interface"),
        ("collector_otlp_grpc_port", "collector's OTLP gRPC receiver"),
        ("collector_otlp_http_port", "collector's OTLP HTTP receiver"),
        ("collector_health_port", "collector's health check"),
        ("collector_metrics_port", "collector's own metrics"),
        ("store_port", "trace store"),
        ("prometheus_port", "Prometheus server"),
        *((("scaler_port", "scaler's own metrics"),) if scenario == AUTOSCALED else ()),
    ):
        ports.append(Port(whole_number(variables, variable), purpose, variable))
    return tuple(ports)


def _of(variables: Mapping[str, object], name: str, scenario: str) -> Mapping[str, object]:
    """The part of a mapping by scenario that is this scenario's."""
    return _mapping(_mapping(variables[name], name).get(scenario), f"{name}.{scenario}")


def _mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {value!r}: set it to a mapping, as the local inventory has it")
    return value


def _ports(numbers: object, purpose: str, variable: str) -> list[Port]:
    found = _mapping(numbers, variable.removesuffix(".{}"))
    named = {variable.format(name): number for name, number in found.items()}
    return [
        Port(whole_number(named, full), purpose.format(name), full) for name, full in zip(found, named, strict=True)
    ]


def _server_ports(server: ModelServer) -> list[Port]:
    ports = [Port(server.port, f"model server {server.name}", "vllm_base_port")]
    if server.sidecar_port:
        ports.append(Port(server.sidecar_port, f"sidecar of {server.name}", "sidecar_base_port"))
    if server.side_channel_port:
        ports.append(Port(server.side_channel_port, f"side channel of {server.name}", "vllm_side_channel_base_port"))
    return ports


def requirements_of(variables: Mapping[str, object], cache_dir: Path, state_dir: Path, run_dir: Path) -> Requirements:
    """What the inventory's stack needs; less disk where the model servers' environment is installed."""
    servers = len(model_servers(variables))
    installed = any(path.suffix != ".partial" for path in cache_dir.glob("vllm/*"))
    return Requirements(
        ports=ports_of(variables),
        # A server takes 2.8 GiB (measured), the rest together about 1 GiB.
        memory=int((2.8 * servers + 1) * GIB),
        disk={cache_dir: GIB if installed else 10 * GIB, state_dir: 3 * GIB},
        cache_dir=cache_dir,
        run_dir=run_dir,
    )
