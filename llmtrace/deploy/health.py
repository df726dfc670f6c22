"""Is every component of a stack running, and does it answer?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from llmtrace.deploy.supervisor import DOWN, Process, Supervisor
from llmtrace.errors import UserError
from llmtrace.stack import Picker, Stack

LOG_LINES = 15
READY_ENDPOINTS = "llm_d_epp_ready_endpoints"


@dataclass(frozen=True)
class Component:
    """A supervised process and how to ask it whether it is ready.

    ``probe`` is an http URL that answers 200, or grpc://HOST:PORT of a gRPC health service. One in ``standby`` need
    not run.
    """

    name: str
    probe: str
    address: str
    standby: bool = False

    def ready(self, timeout_s: float = 2) -> bool:
        """Ask once."""
        if self.probe.startswith("grpc://"):
            return _grpc_serving(self.probe.removeprefix("grpc://"), timeout_s)
        try:
            return httpx.get(self.probe, timeout=timeout_s, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


@dataclass(frozen=True)
class Status:
    """State of a component: its process, and whether it answered."""

    component: Component
    process: Process | None
    ready: bool

    @property
    def ok(self) -> bool:
        """Whether the process runs and answers, or need not."""
        if self.process is None:
            return False
        resting = self.component.standby and self.process.state in DOWN
        return resting or (self.ready and self.process.state == "RUNNING")


def _grpc_serving(target: str, timeout_s: float) -> bool:
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def components(stack: Stack) -> list[Component]:
    """Every component of ``stack``, in the order of a request's way through it."""
    return [
        Component("envoy", f"{stack.envoy_admin}/ready", ", ".join(stack.gateways.values())),
        *(
            Component(
                picker.process,
                f"grpc://127.0.0.1:{picker.health_port}",
                f"127.0.0.1:{picker.grpc_port}",
            )
            for picker in stack.pickers.values()
        ),
        *(Component(server.process, f"{server.url}/health", server.url, server.standby) for server in stack.servers),
        *(Component(sidecar.process, f"{sidecar.url}/health", sidecar.url) for sidecar in stack.sidecars),
        Component("collector", stack.collector_health, stack.collector_otlp_grpc),
        Component("store", f"{stack.store}/ready", stack.store),
        Component("prometheus", f"{stack.prometheus}/-/ready", stack.prometheus),
        *_scaler(stack),
    ]


def _scaler(stack: Stack) -> list[Component]:
    if stack.scaler is None:
        return []
    address = f"http://127.0.0.1:{stack.scaler.metrics_port}"
    return [Component(stack.scaler.process, f"{address}/metrics", address)]


def statuses(stack: Stack) -> list[Status]:
    """Ask supervisord and every component once; a supervisord that is gone shows as no process."""
    try:
        processes = {process.name: process for process in Supervisor(stack.supervisor_socket).processes()}
    except UserError:
        processes = {}
    return [
        Status(component, process := processes.get(component.name), process is not None and component.ready())
        for component in components(stack)
    ]


def log_tail(log: Path, lines: int = LOG_LINES) -> str:
    """Read the last lines of a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(empty log)"


def _said(log: Path, uptime_s: float) -> str:
    """What a process wrote since it was started; its log holds earlier ones' words, too."""
    if not log.exists() or log.stat().st_mtime < time.time() - uptime_s - 1:
        return f"It has written nothing to {log} in the {uptime_s:.0f} s that it runs: is the machine busy?"
    return f"Last lines of {log}:\n{log_tail(log)}"


def wait_ready(
    stack: Stack,
    timeouts_s: Mapping[str, float],
    default_timeout_s: float,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Wait until every component answers; return the seconds each took from the start of the wait.

    ``timeouts_s`` overrules ``default_timeout_s`` by component name. A component that stopped for good or is
    late raises UserError, which names it and ends with the last lines of its log; so does a picker that does not see
    the model servers.
    """
    supervisor = Supervisor(stack.supervisor_socket)
    started = time.monotonic()
    waiting = {component.name: component for component in components(stack) if not component.standby}
    took: dict[str, float] = {}
    while waiting:
        processes = {process.name: process for process in supervisor.processes()}
        for name, component in list(waiting.items()):
            elapsed = time.monotonic() - started
            log = stack.log_dir / f"{name}.log"
            process = processes.get(name)
            if process is None:
                raise UserError(f"supervisord knows no process {name}: run `llmtrace down`, then `llmtrace up`")
            if process.state == "RUNNING" and component.ready():
                del waiting[name]
                took[name] = round(elapsed, 1)
                progress(f"{name} ready after {elapsed:.0f} s")
            elif process.state in {"FATAL", "EXITED"}:
                raise UserError(
                    f"{name} does not stay up ({process.state}); repair what its log {log} says, "
                    f"then run `llmtrace up` again. Last lines:\n{log_tail(log)}"
                )
            elif elapsed > timeouts_s.get(name, default_timeout_s):
                raise UserError(
                    f"{name} did not answer on {component.probe} within {elapsed:.0f} s "
                    f"(process {process.state}). {_said(log, process.uptime_s)}"
                )
        time.sleep(0.5 if waiting else 0)
    for picker in stack.pickers.values():
        _wait_for_endpoints(stack, picker, default_timeout_s)
    return took


def _wait_for_endpoints(stack: Stack, picker: Picker, timeout_s: float) -> None:
    """A server answers a moment before its picker has heard of it; until then the picker sends requests away."""
    wanted = sum(not server.standby for server in stack.servers)
    deadline = time.monotonic() + timeout_s
    while (seen := _ready_endpoints(picker)) is not None and seen < wanted:
        if time.monotonic() > deadline:
            log = stack.log_dir / f"{picker.process}.log"
            raise UserError(
                f"{picker.process} sees {seen:.0f} of {wanted} model servers after {timeout_s:.0f} s. "
                f"Last lines of {log}:\n{log_tail(log)}"
            )
        time.sleep(0.1)


def _ready_endpoints(picker: Picker) -> float | None:
    """Endpoints to which the picker sends requests; None where it does not tell (llm-d's own wants a token)."""
    try:
        page = httpx.get(f"http://127.0.0.1:{picker.metrics_port}/metrics", timeout=2, trust_env=False)
    except httpx.HTTPError:
        return None
    if page.status_code != httpx.codes.OK:
        return None
    families = text_string_to_metric_families(page.text)
    return next((family.samples[0].value for family in families if family.name == READY_ENDPOINTS), None)
