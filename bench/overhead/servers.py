"""Real vLLM servers side by side, and what they use."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from bench import model_server
from bench.overhead import inside
from bench.overhead.plans import PYTHON, Variant
from bench.processes import free_ports, process, wait
from bench.sink import Counts, Receiver, sink

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 600
ANSWER_TIMEOUT_S = 10
HANGS_S = 60.0
"""Longer than the 10 s after which an OTLP exporter gives up."""
KV_CACHE_BYTES = 1 << 28
ENVIRONMENT = model_server.ENVIRONMENT | {
    # As in the kit's stack. Shorter than a round, so that a round pays for what it exports.
    "OTEL_BSP_SCHEDULE_DELAY": "500",
    "OTEL_TRACES_SAMPLER": "parentbased_always_on",
    "no_proxy": "127.0.0.1",
    # Nothing from the current folder: llmtrace is there only for the servers that shall have it.
    "PYTHONSAFEPATH": "1",
}
_COMPLAINTS = re.compile(r"Failed to export|Transient error|Queue full|llmtrace: ")


class Cpu(NamedTuple):
    """CPU seconds (user and system) since the server's start."""

    api_server: float
    engine_core: float
    """And vLLM's other children, which do nothing."""

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.api_server - before.api_server, self.engine_core - before.engine_core)


class Memory(NamedTuple):
    """Bytes of all of a server's processes: resident, and resident with shared pages divided among their users."""

    rss: int
    pss: int


@dataclass(frozen=True)
class Server:
    """A running server."""

    variant: Variant
    port: int
    main: psutil.Process
    receiver: Receiver | None
    log: Path

    def cpu(self) -> Cpu:
        api_server = _cpu(self.main)
        return Cpu(api_server, sum(_cpu(child) for child in self.main.children(recursive=True)))

    def memory(self) -> Memory:
        found = [each.memory_full_info() for each in (self.main, *self.main.children(recursive=True))]
        return Memory(sum(each.rss for each in found), sum(each.pss for each in found))

    def switch(self, hooks: bool) -> None:
        """Take the plugin's hooks out of all of the server's processes, or put them back; nothing may be under way."""
        self._signal(signal.SIGUSR2 if hooks else signal.SIGUSR1, inside.HOOKS_IN if hooks else inside.HOOKS_OUT)

    def times(self) -> dict[str, dict[str, float]]:
        """Of a timed server: what the plugin's hooks of every step took since the last time, by hook."""
        told = self._signal(signal.SIGUSR1, inside.TOLD)
        return {name: summary for text in told for name, summary in json.loads(text).items()}

    def _signal(self, number: int, says: str) -> list[str]:
        """Send it to all of the server's processes; each answers with a line of the log, whose rest is returned."""
        children = [each for each in self.main.children(recursive=True) if each.name().startswith("VLLM::")]
        before = len(self._said(says))
        for each in (self.main, *children):
            each.send_signal(number)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while len(told := self._said(says)[before:]) < 1 + len(children):
            if time.monotonic() > deadline:
                sys.exit(f"{self.variant.name} did not say {says!r} within {ANSWER_TIMEOUT_S} s; its log: {self.log}")
            time.sleep(0.02)
        return told

    def exported(self) -> Counts:
        return self.receiver.counts() if self.receiver else Counts()

    def complaints(self) -> int:
        """Lines about export and drops in the server's log."""
        return sum(1 for line in self.log.read_text(errors="replace").splitlines() if _COMPLAINTS.search(line))

    def _said(self, text: str) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        return [line.partition(text)[2] for line in lines if text in line and line.endswith("\n")]


def install_plugin(folder: Path) -> Path:
    """Put this checkout and the bench's own plugin into ``folder``: servers that shall have both import from it."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--refresh-package", "llmtrace"]
    command += ["--target", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    name = "overhead_bench"
    shutil.copy(inside.__file__, folder / f"{name}.py")
    package = folder / f"{name}-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")
    return folder


def make_tiny_model(folder: Path) -> Path:
    subprocess.run([str(PYTHON), str(model_server.TINY_MODEL_SCRIPT), str(folder)], check=True, capture_output=True)
    return folder


@contextmanager
def serve(model: Path, variants: tuple[Variant, ...], plugin: Path, logs: Path) -> Iterator[dict[Variant, Server]]:
    """Start one server for each variant, all at once, and yield them when all answer."""
    with ExitStack() as stack:
        receivers = stack.enter_context(sink([HANGS_S if each.collector == "hangs" else 0.0 for each in variants]))
        *ports, nobody = free_ports(len(variants) + 1)
        started = []
        for variant, port, receiver in zip(variants, ports, receivers, strict=True):
            command = _command(model, port)
            if variant.traced:
                collector = nobody if variant.collector == "down" else receiver.port
                command += ["--otlp-traces-endpoint", f"http://127.0.0.1:{collector}"]
            environment = ENVIRONMENT | {"PYTHONPATH": str(plugin) if variant.plugin else ""}
            if variant.timed:
                environment[inside.TIMES] = "1"
            log = logs / f"{variant.name}.log"
            child = stack.enter_context(process(command, log, environment))
            started.append((Server(variant, port, psutil.Process(child.pid), receiver, log), child))
        for server, child in started:
            wait(f"http://127.0.0.1:{server.port}/health", server.log, START_TIMEOUT_S, child)
        yield {server.variant: server for server, _ in started}


def _command(model: Path, port: int) -> list[str]:
    return [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", "1024", "--block-size", "32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--gpu-memory-utilization", "0.15"),
        *("--distributed-executor-backend", model_server.EXECUTOR),
    ]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
