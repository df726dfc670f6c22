"""Measures the trace store over HTTP: ingest, trace by id, search by attribute.

``python -m bench.store [--spans N] [--json]``. The store runs in a process of its own with a new database file
in a temporary directory; the requests are what a collector sends: protobuf, 512 spans, gzip on demand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from llmtrace.traces.otlp import key_values

BATCH = 512
SPANS_PER_TRACE = 8
SENDERS = 4
LOOKUPS = 300
RUN_TRACES = 2000
NAMES = ("chat", "gateway", "picker.schedule", "picker.score", "router", "llm_request", "prefill", "decode")


@contextmanager
def running_store(db: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llmtrace.traces.store", "--port", str(port), "--db", str(db)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Spans:
    """Makes requests of whole traces, and remembers some of the ids."""

    def __init__(self) -> None:
        self.random = random.Random(7)
        self.trace_ids: list[str] = []
        self.made = 0

    def request(self, run_id: str) -> bytes:
        message = ExportTraceServiceRequest()
        scopes = []
        for service in ("client", "gateway", "picker", "model-server"):
            of_resource = message.resource_spans.add()
            of_resource.resource.attributes.extend(
                key_values({"service.name": service, "service.instance.id": f"{service}-0", "host.name": "node"})
            )
            scopes.append(of_resource.scope_spans.add())
            scopes[-1].scope.name = "bench"
        now = time.time_ns()
        for _ in range(BATCH // SPANS_PER_TRACE):
            trace_id = self.random.randbytes(16)
            self.trace_ids.append(trace_id.hex())
            parent = b""
            for index, name in enumerate(NAMES):
                span_id = self.random.randbytes(8)
                span = scopes[index // 2].spans.add(
                    trace_id=trace_id, span_id=span_id, parent_span_id=parent, name=name, kind=1 + index % 3
                )
                span.start_time_unix_nano = now + index * 10_000
                span.end_time_unix_nano = now + 900_000_000 - index * 10_000
                span.attributes.extend(key_values(self._attributes(run_id if index == 0 else "")))
                parent = span_id
        self.made += BATCH
        return message.SerializeToString()

    def _attributes(self, run_id: str) -> dict[str, str | int | float | bool]:
        pick = self.random
        found: dict[str, str | int | float | bool] = {
            "gen_ai.request.model": "meta-llama/Llama-3.1-8B-Instruct",
            "gen_ai.usage.input_tokens": pick.randrange(4000),
            "gen_ai.usage.output_tokens": pick.randrange(400),
            "gen_ai.response.id": f"chatcmpl-{pick.randrange(10**12)}",
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "server.address": f"10.0.0.{pick.randrange(8)}",
            "server.port": 8000,
            "picker.score": pick.random(),
            "stream": True,
        }
        if run_id:
            found["llmtrace.scenario.run_id"] = run_id
        return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def timed(call: object, count: int, ids: list[str] | None = None) -> dict[str, float]:
    assert callable(call)
    found = []
    for index in range(count):
        start = time.perf_counter()
        call(ids[index]) if ids else call()
        found.append((time.perf_counter() - start) * 1e3)
    return {"p50_ms": round(percentile(found, 0.5), 2), "p99_ms": round(percentile(found, 0.99), 2)}


def ingest(url: str, spans: Spans, total: int, compressed: bool) -> tuple[float, float]:
    """Send ``total`` spans; returns seconds and the longest request in ms. Requests are made beforehand."""
    seconds = 0.0
    slowest = 0.0
    headers = {"Content-Type": "application/x-protobuf"}
    if compressed:
        headers["Content-Encoding"] = "gzip"
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(SENDERS) as pool:

        def post(body: bytes) -> float:
            start = time.perf_counter()
            client.post(f"{url}/v1/traces", content=body, headers=headers).raise_for_status()
            return time.perf_counter() - start

        sent = 0
        while sent < total:
            count = min(100, -(-(total - sent) // BATCH))
            run = [spans.request(f"run-{(sent // BATCH + i) // (RUN_TRACES * 8 // BATCH)}") for i in range(count)]
            bodies = [gzip.compress(body, 1) for body in run] if compressed else run
            start = time.perf_counter()
            slowest = max(slowest, *pool.map(post, bodies))
            seconds += time.perf_counter() - start
            sent += count * BATCH
    return seconds, slowest * 1e3


def measure(total: int, compressed: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        db = Path(directory) / "traces.duckdb"
        with running_store(db) as url, httpx.Client(base_url=url, timeout=60) as client:
            spans = Spans()
            seconds, slowest = ingest(url, spans, total, compressed)
            accept = {"Accept": "application/protobuf"}
            ids = random.Random(3).sample(spans.trace_ids, min(LOOKUPS, len(spans.trace_ids)))

            def search(q: str, limit: int) -> None:
                client.get("/api/search", params={"q": q, "limit": str(limit)}).raise_for_status()

            run = '{ span.llmtrace.scenario.run_id = "run-3" }'
            both = '{ name = "chat" && span.llmtrace.scenario.run_id = "run-3" }'
            return {
                "spans": spans.made,
                "cores": os.cpu_count(),
                "ingest_spans_per_s": round(spans.made / seconds),
                "slowest_post_ms": round(slowest, 1),
                "trace_by_id": timed(
                    lambda i: client.get(f"/api/v2/traces/{i}", headers=accept).raise_for_status(),
                    len(ids),
                    ids,
                ),
                "search_equality_limit_20": timed(lambda: search(run, 20), 20),
                "search_equality_limit_5000": timed(lambda: search(run, 5000), 10),
                "search_name_and_equality_limit_5000": timed(lambda: search(both, 5000), 10),
                "search_all_limit_20": timed(lambda: search("{}", 20), 10),
                "search_join_limit_20": timed(lambda: search('{ name = "chat" } >> { name = "decode" }', 20), 5),
                "file_mb": round(sum(f.stat().st_size for f in Path(directory).iterdir()) / 1e6, 1),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=1_000_000)
    parser.add_argument("--gzip", action="store_true", help="send the bodies compressed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options.spans, options.gzip)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:38} {text}")


if __name__ == "__main__":
    main()
