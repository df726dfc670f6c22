"""A store of its own for a test, in this process or in another."""

import subprocess
import sys
import time
from pathlib import Path

import httpx

from llmtrace.traces.model import Span

A, B = "a" * 32, "0" * 31 + "b"
NOW_S = 1_800_000_000


def a_span(trace_id: str = A, number: int = 1, **changes: object) -> Span:
    plain: dict[str, object] = {
        "trace_id": trace_id,
        "span_id": f"{number:016x}",
        "parent_id": None if number == 1 else f"{1:016x}",
        "name": f"span {number}",
        "kind": "SERVER",
        "start_ns": NOW_S * 10**9 + number,
        "end_ns": NOW_S * 10**9 + 5_000_000,
        "status": "ERROR",
        "attributes": {"n": number, "run.id": "r1"},
        "resource": {"service.name": "gateway"},
    }
    return Span(**(plain | changes))  # type: ignore[arg-type]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llmtrace.traces.store", *arguments]


def start(db: Path, port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command("--port", str(port), "--db", str(db)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.03)
        if process.poll() is not None:
            break
    process.kill()
    process.wait()
    raise AssertionError("the store did not start")
