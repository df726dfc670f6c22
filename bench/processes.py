"""Processes that the benchmarks start, and how they wait for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

STOP_TIMEOUT_S = 15


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def process(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` with ``environment`` added to this process's, its output in ``log``; stopped at the end."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def wait(url: str, log: Path, timeout_s: float, child: subprocess.Popen[bytes] | None = None) -> None:
    """Until ``url`` answers 200; ends the program with ``log`` if it does not in time, or ``child`` has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and (child is None or child.poll() is None):
        try:
            if httpx.get(url, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    sys.exit(f"{url} did not answer within {timeout_s:.0f} s; the end of its log:\n{log.read_text()[-4000:]}")
