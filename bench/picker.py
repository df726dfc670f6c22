"""Measures one routing decision of the picker, by the number of endpoints.

``python -m bench.picker [--json]``. A decision is everything between a parsed request and its destination: block hashes
of a prompt of 4 kB, three scorers, the pick, and with tracing on its eight spans, encoded. "P/D" is the same with
prefill/decode disaggregation, half of the endpoints of each role: two profiles and 16 spans where a request is split,
which nearly every one is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind

from bench.gateway import PICKER_CONFIG
from llmtrace.picker import config
from llmtrace.picker.endpoints import Endpoint, Load, Pool
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.request import InferenceRequest, parse
from llmtrace.picker.scheduler import Scheduler
from llmtrace.picker.spans import Tracer

PD_CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - {{type: file-discovery, parameters: {{path: {endpoints}}}}}
  - {{type: approx-prefix-cache-producer, parameters: {{autoTune: false, blockSizeTokens: 64}}}}
  - {{type: prefix-cache-scorer}}
  - {{type: queue-scorer}}
  - {{type: prefill-filter}}
  - {{type: decode-filter}}
  - {{type: prefix-based-pd-decider, parameters: {{nonCachedTokens: 1}}}}
  - {{type: disagg-profile-handler, parameters: {{deciders: {{prefill: prefix-based-pd-decider}}}}}}
schedulingProfiles:
  - name: prefill
    plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: queue-scorer}}]
  - name: decode
    plugins: [{{pluginRef: decode-filter}}, {{pluginRef: prefix-cache-scorer, weight: 2}}, {{pluginRef: queue-scorer}}]
dataLayer: {{discovery: {{pluginRef: file-discovery}}}}
"""
WAYS = {"": PICKER_CONFIG, ", P/D": PD_CONFIG}
ROLES = ("prefill", "decode")
ENDPOINTS = (3, 16, 256)
DECISIONS = 2000
TENANTS = 50
PROMPT_BYTES = 4096


class Handle:
    def __init__(self) -> None:
        self.pool = Pool("bench")
        self.metrics = Metrics(self.pool)
        self.tracer = Tracer(TracerProvider(), None, "bench")


class Discard(SpanProcessor):
    """Stands for the queue of the exporter."""


def request(number: int) -> InferenceRequest:
    text = f"tenant {number % TENANTS} " * (PROMPT_BYTES // 10)
    body = {"model": "bench", "messages": [{"role": "user", "content": f"{text[:PROMPT_BYTES]} question {number}"}]}
    return parse(f"r{number}", {":path": "/v1/chat/completions"}, json.dumps(body).encode())


def endpoint(i: int) -> Endpoint:
    labels = {"llm-d.ai/role": ROLES[i % 2]}
    return Endpoint(f"b{i}", "default", f"10.0.{i // 250}.{i % 250 + 1}", "8000", labels, Load(waiting=i // 2 % 4))


def measure(count: int, content: str, *, tracing: bool) -> dict[str, float]:
    handle = Handle()
    handle.pool.replace(map(endpoint, range(count)))
    endpoints = list(handle.pool)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picker.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(content.format(endpoints="unused"))))
        configuration = config.load(path, handle)
    tracer = Tracer(TracerProvider(), Discard() if tracing else None, "bench")
    scheduler = Scheduler(configuration, handle.metrics, tracer)
    random.seed(1)
    times = []
    for number in range(DECISIONS + 200):
        asked = request(number)
        start = time.perf_counter()
        span = tracer.start("gateway.request_orchestration", None, SpanKind.SERVER)
        result = scheduler.schedule(asked, endpoints, span)
        scheduler.scheduled(asked, result, span)
        span.end()
        times.append(time.perf_counter() - start)
    times = sorted(times[200:])
    return {"p50_ms": statistics.median(times) * 1e3, "p99_ms": times[int(len(times) * 0.99)] * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        f"{count} endpoints{way}": {
            "traced": measure(count, content, tracing=True),
            "untraced": measure(count, content, tracing=False),
        }
        for way, content in WAYS.items()
        for count in ENDPOINTS
    }
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, found in results.items():
        for mode, values in found.items():
            print(f"{name:18} {mode:9} p50 {values['p50_ms']:.3f} ms   p99 {values['p99_ms']:.3f} ms")


if __name__ == "__main__":
    main()
