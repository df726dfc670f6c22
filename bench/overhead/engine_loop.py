"""The plugin's cost in vLLM's own loops, per step and per request: what a server on GPUs pays as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.overhead.plans import PYTHON
from bench.overhead.servers import ENVIRONMENT
from bench.sink import sink

SCRIPT = Path(__file__).with_name("steps.py")
TIMEOUT_S = 300


@dataclass(frozen=True)
class Costs:
    """Microseconds, with a number of requests running together. What names no ``own_`` is added by the plugin."""

    running: int
    scheduler: float
    """vLLM's scheduler itself, per step."""
    step_unsampled: float
    """In the engine core, per step in which all requests decode, none of them sampled."""
    step: float
    """The same, all of them sampled; so everything below."""
    api_step: float
    """In the API server's event loop, per such step."""
    request: float
    """In the engine core, per request, beside its decode steps."""
    api_request: float
    """In the API server's event loop, per request, beside its decode steps."""
    spans_request: float
    """CPU time of the thread that makes the spans, per request."""
    export_request: float
    """CPU time of the exporter's thread, per request, ``llm_request`` included."""
    own_request: float
    """vLLM's making of ``llm_request``, CPU time per request."""
    own_export_request: float
    """CPU time of the exporter's thread without the plugin, per request."""

    def share(self, step_ms: float) -> float:
        """Percent of a step of ``step_ms``."""
        return self.step / (step_ms * 1e3) * 100

    @property
    def added_request(self) -> float:
        """CPU time in the API server per request, on top of vLLM's own tracing."""
        return self.api_request + self.spans_request + self.export_request - self.own_export_request


def measure(model: Path, plugin: Path) -> list[Costs]:
    """Run the script with vLLM's environment and the plugin. Ends the program where that fails."""
    with sink() as [receiver]:
        done = subprocess.run(
            [str(PYTHON), str(SCRIPT), str(model), f"http://127.0.0.1:{receiver.port}"],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(plugin)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{SCRIPT.name} failed:\n{done.stdout[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Costs(int(running), **costs) for running, costs in found.items()]
