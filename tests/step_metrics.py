"""Ranks that step together, made up, whose sums are the engine's own and reach a Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import httpx
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from llmtrace.engine.steps.batch import Batch
from llmtrace.engine.steps.recorder import Phases, Record
from llmtrace.engine.steps.totals import Totals

ATTENTION_MS, EXPERTS_MS, TRANSFER_MS, OTHER_MS = 4.0, 6.0, 1.0, 1.0


class Ranks:
    """``nodes`` has the node of each rank; the ranks of a node are workers of one pod, named after it."""

    def __init__(self, nodes: Sequence[str], group: str = "g") -> None:
        self._group = group
        self._ranks: list[tuple[Totals, InMemoryMetricReader]] = []
        for world, node in enumerate(nodes):
            reader = InMemoryMetricReader()
            pod = {"service.name": "vllm", "service.instance.id": f"pod-{node}", "llmtrace.role": "decode"}
            totals = Totals(world, len(nodes), node)
            totals.publish(MeterProvider([reader], Resource(pod)).get_meter("llmtrace.engine"))
            self._ranks.append((totals, reader))

    def step(
        self,
        number: int,
        *,
        experts_ms: Mapping[int, float] | None = None,
        requests: Mapping[int, int] | None = None,
        tokens: Sequence[int] = (),
    ) -> None:
        """One step. ``experts_ms`` are ranks' where it is not the usual; a rank without ``requests`` has one.

        Before the experts and after them stands a collective, which all leave together. ``tokens`` are those that each
        rank sends to each expert.
        """
        experts = [(experts_ms or {}).get(world, EXPERTS_MS) for world in range(len(self._ranks))]
        for world, (totals, _) in enumerate(self._ranks):
            decoded = (requests or {}).get(world, 1)
            batch = Batch(self._group, number, dummy=not decoded, decode_tokens=decoded)
            waited = max(experts) - experts[world]
            found = Phases(ATTENTION_MS, TRANSFER_MS, experts[world], TRANSFER_MS + waited, 0.0, 0, 1.0)
            lasted = ATTENTION_MS + 2 * TRANSFER_MS + max(experts) + OTHER_MS
            sent = SimpleNamespace(tolist=lambda: list(tokens)) if tokens else None
            totals.add(Record(batch, 0, 0.0, computed_tokens=1, expert_tokens=sent), found, lasted)

    def push(self, client: httpx.Client) -> None:
        """Send what every rank's sums are now, each by itself, as its process does."""
        for _, reader in self._ranks:
            data = reader.get_metrics_data()
            assert data is not None
            body = encode_metrics(data).SerializeToString()
            answer = client.post(
                "/api/v1/otlp/v1/metrics", content=body, headers={"content-type": "application/x-protobuf"}
            )
            assert answer.status_code < 300, answer.text
