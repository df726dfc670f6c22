"""The scaler with a real supervisord, and replicas that are real processes."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scaling import FAST, Load, Web, scaled_object, until
from test_deploy_supervisor import Sandbox

from llmtrace.autoscale.fleet import Patience
from llmtrace.autoscale.scaled_object import ScaledObject
from llmtrace.autoscale.scaler import Options, Scaler
from llmtrace.endpoints_file import EndpointEntry, parse
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing

SERVER = """
import http.server, sys, time
print("INFO Initializing a V1 LLM engine", flush=True)
time.sleep(0.2)
print("INFO init engine (profile, create kv cache) took 0.2 s", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 0.0\\nvllm:generation_tokens_total 4.0\\n")
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
BROKEN = "import sys; print('ERROR no such model', flush=True); sys.exit(1)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rig:
    """A supervisord with three replicas, of which the first is started at once."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.ports = [free_port() for _ in range(3)]
        self.endpoints = sandbox.folder / "endpoints.yaml"
        self.exporter = InMemorySpanExporter()
        for number in range(3):
            self.describe(number, SERVER)

    def describe(self, number: int, code: str) -> None:
        script = self.sandbox.folder / f"replica-{number}.py"
        script.write_text(code)
        self.sandbox.program(f"vllm-{number}", autostart=number == 0)
        ini = self.sandbox.folder / f"vllm-{number}.ini"
        lines = [
            f"command = {sys.executable} {script} {self.ports[number]}" if line.startswith("command") else line
            for line in ini.read_text().splitlines()
        ]
        ini.write_text("\n".join(lines) + "\n")

    def scaler(self, prometheus: str, patience: Patience = FAST) -> Scaler:
        entries = [EndpointEntry(name=f"vllm-{n}", address="127.0.0.1", port=str(p)) for n, p in enumerate(self.ports)]
        options = Options(
            scaled_object=ScaledObject.model_validate(scaled_object(prometheus, maxReplicaCount=2)),
            replicas=entries,
            endpoints=self.endpoints,
            state=self.sandbox.folder / "state.json",
            settle_s=0,
            patience=patience,
        )
        tracing = Tracing(TracerProvider(), SimpleSpanProcessor(self.exporter), self.exporter)
        return Scaler(options, self.sandbox.supervisor, tracing)

    def listed(self) -> list[str]:
        return [entry.name for entry in parse(self.endpoints.read_bytes(), self.endpoints)]

    def names(self) -> list[str]:
        return [span.name for span in self.exporter.get_finished_spans()]

    def attributes(self, name: str) -> list[Any]:
        return [span.attributes for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    sandbox = Sandbox(tmp_path_factory.mktemp("s"))
    yield Rig(sandbox)
    sandbox.supervisor.shutdown(20)


async def settled(scaler: Scaler) -> None:
    await until(lambda: not any(d.open for d in scaler.state.decisions), "the decisions' effects", 20)
    await scaler.send()


async def test_processes_are_started_and_stopped(rig: Rig) -> None:
    rig.sandbox.supervisor.launch(rig.sandbox.conf)
    load = Load(queue=9)
    with Web(load.page).serving() as web:
        scaler = rig.scaler(f"http://127.0.0.1:{web.port}")
        await scaler.begin()
        await scaler.tick()
        await until(lambda: rig.listed() == ["vllm-0", "vllm-1"], "both replicas in the picker's file", 20)
        await settled(scaler)
        states = {name: p.state for name, p in rig.sandbox.processes().items()}
        assert states == {"vllm-0": "RUNNING", "vllm-1": "RUNNING", "vllm-2": "STOPPED"}
        load.queue = 0
        deadline = time.monotonic() + 20
        while rig.listed() != ["vllm-0"]:
            assert time.monotonic() < deadline
            await scaler.tick()
        await settled(scaler)
        await scaler.close()
    assert rig.sandbox.processes()["vllm-1"].state == "STOPPED"
    served = [r for r in rig.attributes(a.REPLICA_SPAN) if r[a.OUTCOME] == a.OUTCOME_SERVED]
    assert "vllm-1" in [r[a.REPLICA] for r in served]
    assert {a.CONTAINER_START_SPAN, a.MODEL_LOAD_SPAN, a.READY_SPAN, a.FIRST_REQUEST_SPAN, a.DRAIN_SPAN} <= set(
        rig.names()
    )


async def test_a_process_that_cannot_start_says_why(rig: Rig) -> None:
    rig.describe(1, BROKEN)
    ini = rig.sandbox.folder / "vllm-1.ini"
    ini.write_text(ini.read_text().replace("startsecs = 0", "startsecs = 1"))
    rig.sandbox.supervisor.launch(rig.sandbox.conf)
    load = Load(queue=9)
    with Web(load.page).serving() as web:
        scaler = rig.scaler(f"http://127.0.0.1:{web.port}", Patience(ready_s=20, retry_s=60, look_s=0.05))
        await scaler.begin()
        await scaler.tick()
        await until(lambda: any(r.outcome for d in scaler.state.decisions for r in d.replicas), "the failure", 20)
        failures = [r.failure for d in scaler.state.decisions for r in d.replicas if r.name == "vllm-1"]
        await scaler.close()
    assert failures == ["the process ended: FATAL; its log says: ERROR no such model"]
