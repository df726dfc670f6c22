"""Measures one routing decision of the picker, by the number of endpoints.

``python -m bench.picker [--json]``. A decision is everything between a parsed request and its destination: block hashes
of a prompt of 4 kB, three scorers, the pick, and with tracing on its eight spans, encoded. "P/D" is the same with
prefill/decode disaggregation, half of the endpoints of each role: two profiles and 16 spans where a request is split,
which nearly every one is. "precise" looks the prompt's blocks of 16 tokens up in an index of KV cache events, in which
every other endpoint has the tenant's prompt; ten spans. Asking a model server for the tokens is not part of it.

Then the index alone: 100,000 blocks of one server come in by events of 64 blocks each; their memory, and their time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind

from bench.gateway import PICKER_CONFIG
from llmtrace.picker import config
from llmtrace.picker.endpoints import Endpoint, Load, Pool
from llmtrace.picker.kv_events import Batch, BlockStored, Message
from llmtrace.picker.kv_index import KVBlockIndex
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.plugins.precise_prefix_cache_producer import PrecisePrefixCacheProducer
from llmtrace.picker.request import BYTES_PER_TOKEN, InferenceRequest, parse
from llmtrace.picker.scheduler import Scheduler
from llmtrace.spans import Tracer

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
PRECISE_CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - {{type: file-discovery, parameters: {{path: {endpoints}}}}}
  - {{type: token-producer, parameters: {{modelName: bench}}}}
  - {{type: precise-prefix-cache-producer}}
  - {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}}}
  - {{type: queue-scorer}}
  - {{type: kv-cache-utilization-scorer}}
  - {{type: max-score-picker}}
dataLayer: {{discovery: {{pluginRef: file-discovery}}}}
"""
WAYS = {"": PICKER_CONFIG, ", P/D": PD_CONFIG, ", precise": PRECISE_CONFIG}
ROLES = ("prefill", "decode")
ENDPOINTS = (3, 16, 256)
DECISIONS = 2000
TENANTS = 50
PROMPT_BYTES = 4096
BLOCK_SIZE = 16
EVENT_BLOCKS = 64
INDEXED_BLOCKS = 100_000


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


def stored(hashes: Sequence[int], tokens: Sequence[int]) -> Message:
    """What a server says that stored the blocks of a prompt."""
    event = BlockStored(
        block_hashes=list(hashes), parent_block_hash=None, token_ids=list(tokens), block_size=BLOCK_SIZE, medium="GPU"
    )
    return Message(0, "bench", Batch(0.0, [event]))


def fill(producer: PrecisePrefixCacheProducer, endpoints: Sequence[Endpoint]) -> None:
    """Each endpoint has the prompts of every other tenant."""
    for tenant in range(TENANTS):
        (prompt,) = request(tenant).prompts
        blocks = len(prompt) // BYTES_PER_TOKEN // BLOCK_SIZE - 1
        tokens = struct.unpack_from(f"<{blocks * BLOCK_SIZE}I", prompt)
        for number, each in enumerate(endpoints):
            if (tenant + number) % 2:
                producer.apply(each.id, stored(range(tenant * 1000, tenant * 1000 + blocks), tokens))


def measure_index() -> dict[str, float]:
    index = KVBlockIndex(BLOCK_SIZE)
    dice = random.Random(1)
    messages = [
        stored(
            [dice.getrandbits(64) for _ in range(EVENT_BLOCKS)],
            [dice.randrange(50_000) for _ in range(EVENT_BLOCKS * BLOCK_SIZE)],
        )
        for _ in range(INDEXED_BLOCKS // EVENT_BLOCKS)
    ]
    tracemalloc.start()
    for message in messages:
        # The numbers of a message are gone when it is applied; those that the index keeps are its own.
        index.apply("b0", message.model, message.batch)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    again = KVBlockIndex(BLOCK_SIZE)
    start = time.perf_counter()
    for message in messages:
        again.apply("b0", message.model, message.batch)
    taken = time.perf_counter() - start
    return {"blocks": len(index), "mib": size / (1 << 20), "us_per_block": taken / len(again) * 1e6}


def measure(count: int, content: str, *, tracing: bool) -> dict[str, float]:
    handle = Handle()
    handle.pool.replace(map(endpoint, range(count)))
    endpoints = list(handle.pool)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picker.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(content.format(endpoints="unused"))))
        configuration = config.load(path, handle)
    for producer in configuration.producers:
        if isinstance(producer, PrecisePrefixCacheProducer):
            fill(producer, endpoints)
    tracer = Tracer(TracerProvider(), Discard() if tracing else None, "bench")
    scheduler = Scheduler(configuration, handle.metrics, tracer)
    random.seed(1)
    times = []
    for number in range(DECISIONS + 200):
        asked = request(number)
        asked.tokenized = True
        start = time.perf_counter()
        span = tracer.start("gateway.request_orchestration", None, SpanKind.SERVER)
        asked.span = span
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
    index = measure_index()
    if arguments.json:
        print(json.dumps({**results, "index": index}, indent=2))
        return
    for name, found in results.items():
        for mode, values in found.items():
            print(f"{name:22} {mode:9} p50 {values['p50_ms']:.3f} ms   p99 {values['p99_ms']:.3f} ms")
    print(f"index of {index['blocks']:,} blocks {index['mib']:.1f} MiB   {index['us_per_block']:.2f} us a block")


if __name__ == "__main__":
    main()
