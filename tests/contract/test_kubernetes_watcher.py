"""The watcher as a whole: from what an API server tells to traces at a collector, over restarts and failures."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kubernetes_server import ApiServer
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from test_kubernetes_watch import kubeconfig

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import kubernetes_objects
from kubernetes_objects import deployment, hpa, ns, pod, pulled, rescale
from scaling import until

from llmtrace.autoscale.kubernetes.api import Api
from llmtrace.autoscale.kubernetes.controller import Options, Watcher
from llmtrace.autoscale.kubernetes.leader import Lease
from llmtrace.autoscale.kubernetes.ledger import State
from llmtrace.autoscale.kubernetes.progress import Patience
from llmtrace.errors import UserError
from llmtrace.semconv import attributes as a
from llmtrace.telemetry import Tracing

WAIT_S = 20
HPAS = "/apis/autoscaling/v2/namespaces/llm-d/horizontalpodautoscalers"
DEPLOYMENTS = "/apis/apps/v1/namespaces/llm-d/deployments"
PODS = "/api/v1/namespaces/llm-d/pods"
EVENTS = "/api/v1/namespaces/llm-d/events"
OPTIONAL = (
    "/apis/keda.sh/v1alpha1/namespaces/llm-d/scaledobjects",
    "/apis/llmd.ai/v1alpha1/namespaces/llm-d/variantautoscalings",
    "/apis/leaderworkerset.x-k8s.io/v1/namespaces/llm-d/leaderworkersets",
)
LEASE = "/apis/coordination.k8s.io/v1/namespaces/tracing/leases"
STATE = "/api/v1/namespaces/tracing/configmaps"


class Collector(SpanExporter):
    """Keeps what is exported, or refuses it."""

    def __init__(self) -> None:
        self.sent: list[list[ReadableSpan]] = []
        self.refuses = False

    def export(self, spans: Any) -> SpanExportResult:
        if self.refuses:
            return SpanExportResult.FAILURE
        self.sent.append(list(spans))
        return SpanExportResult.SUCCESS

    def ids(self) -> list[str]:
        return [str((spans[0].attributes or {})[a.SCALE_DECISION_ID]) for spans in self.sent]


@pytest.fixture(autouse=True)
def _now(monkeypatch):
    # A minute ago: what happens in the examples has happened.
    monkeypatch.setattr(kubernetes_objects, "START", int(time.time()) - 60)


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as made:
        made.absent |= set(OPTIONAL)
        await made.put(DEPLOYMENTS, deployment(1))
        await made.put(HPAS, hpa(1, 1))
        begun = State(since_ns=ns(0)).model_dump_json()
        await made.put(STATE, {"metadata": {"name": "llmtrace-autoscale"}, "data": {"state.json": begun}})
        yield made


@asynccontextmanager
async def watching(
    server: ApiServer, folder: Path, collector: Collector, identity: str = "one", **patience: float
) -> AsyncIterator[Watcher]:
    options = Options(
        namespace="llm-d",
        home="tracing",
        identity=identity,
        lease_s=2.0,
        patience=Patience(**({"settle_s": 0.5, "overtaken_s": 0.5} | patience)),
    )
    tracing = Tracing(TracerProvider(resource=Resource({"service.name": a.SCALER_SERVICE})), None, collector)
    watcher = Watcher(options, await Api.connect(kubeconfig(folder, server.port)), tracing)
    stop = asyncio.Event()
    task = asyncio.create_task(watcher.run(stop))
    try:
        yield watcher
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([task])
    task.result()


def leads(server: ApiServer, identity: str) -> bool:
    lease = server.objects[LEASE].get("llmtrace-autoscale")
    return lease is not None and lease["spec"]["holderIdentity"] == identity


async def ready(server: ApiServer) -> None:
    """Wait until the HPA as it is was read: it is in the state then."""
    await until(lambda: '"size":1' in state(server), "the first look")


def state(server: ApiServer) -> str:
    found = server.objects[STATE].get("llmtrace-autoscale")
    return str(found["data"]["state.json"]) if found else ""


async def scale(server: ApiServer, before: int, after: int, time_s: float, *, event: bool = True) -> None:
    """What the HPA controller and the ReplicaSet's leave behind."""
    await server.put(DEPLOYMENTS, deployment(after))
    await server.put(HPAS, hpa(before, after, time_s))
    if event:
        await server.put(EVENTS, rescale(after, time_s))


async def test_a_decision_becomes_one_trace_with_its_replica_phases(server, tmp_path):
    collector = Collector()
    async with watching(server, tmp_path, collector):
        await ready(server)
        await scale(server, 1, 2, 1)
        await server.put(PODS, pod("vllm-b", 1, unschedulable="no node"))
        await server.put(PODS, pod("vllm-b", 1, 2))
        await server.put(EVENTS, pulled("vllm-b", 3))
        await server.put(PODS, pod("vllm-b", 1, 2, 4, 6))
        await until(lambda: bool(collector.sent), "the trace")
        await until(lambda: '"decisions":[]' in state(server), "its leaving the state")
    (spans,) = collector.sent
    assert [s.name for s in spans] == [
        a.DECISION_SPAN, a.APPLY_SPAN, a.REPLICA_SPAN,
        a.SCHEDULE_SPAN, a.IMAGE_PULL_SPAN, a.CONTAINER_START_SPAN, a.READY_SPAN,
    ]  # fmt: skip
    root = spans[0]
    assert root.start_time == ns(1)
    assert root.attributes[a.SCALER_NAME] == "llm-d/vllm"
    assert (root.attributes[a.REPLICAS_CURRENT], root.attributes[a.REPLICAS_DESIRED]) == (1, 2)
    assert root.attributes[a.SCALE_REASON].startswith("external metric")
    assert root.attributes[a.ACCELERATORS] == 2.0
    assert [(s.start_time, s.end_time) for s in spans[3:]] == [
        (ns(1), ns(2)), (ns(2), ns(3)), (ns(3), ns(4)), (ns(4), ns(6)),
    ]  # fmt: skip


async def test_the_leader_tells_the_replicas_asked_for_and_ready_while_it_leads(server, tmp_path):
    def told(watcher: Watcher) -> tuple[float | None, ...]:
        names = (f"llmtrace_autoscale_{kind}_replicas" for kind in ("current", "ready"))
        return tuple(watcher.registry.get_sample_value(name, {"workload": "llm-d/vllm"}) for name in names)

    async with watching(server, tmp_path, Collector()) as watcher:
        await until(lambda: told(watcher) == (1, 1), "the first look")
        await server.put(DEPLOYMENTS, deployment(3))
        await until(lambda: told(watcher) == (3, 1), "the scaling up")
        await server.put(DEPLOYMENTS, deployment(3, ready=3))
        await until(lambda: told(watcher) == (3, 3), "their being ready")
        await server.remove(HPAS, "vllm")
        await until(lambda: told(watcher) == (None, None), "the end of what is scaled no more")


async def test_the_first_watcher_begins_now(server, tmp_path):
    server.objects[STATE].clear()
    await scale(server, 1, 2, 1)
    collector = Collector()
    async with watching(server, tmp_path, collector):
        await until(lambda: '"size":null' in state(server), "the first look")
        await scale(server, 2, 3, 61)
        await server.put(PODS, pod("vllm-c", 61, 61, 62, 63))
        await until(lambda: bool(collector.sent), "the trace")
    assert [s[0].attributes[a.REPLICAS_DESIRED] for s in collector.sent] == [3]


async def test_a_restart_goes_on_with_what_was_begun_and_finds_what_was_missed(server, tmp_path):
    collector = Collector()
    async with watching(server, tmp_path, collector):
        await ready(server)
        await scale(server, 1, 2, 1)
        await server.put(PODS, pod("vllm-b", 1, 2))
        await until(lambda: "vllm-b" in state(server), "the replica in the state")
    assert collector.sent == []
    # Nobody watches: it gets ready, and two more decisions are taken; only events tell of the first.
    await server.put(PODS, pod("vllm-b", 1, 2, 3, 4))
    await scale(server, 2, 4, 10)
    for name in ("vllm-c", "vllm-d"):
        await server.put(PODS, pod(name, 10, 11, 12, 13))
    await scale(server, 4, 3, 20)
    await server.remove(PODS, "vllm-d")
    about = {"kind": "ReplicaSet", "namespace": "llm-d", "name": "vllm-5d4f", "uid": "rs"}
    await server.put(EVENTS, kubernetes_objects.event("SuccessfulDelete", "Deleted pod: vllm-d", 20, about))
    await server.put(HPAS, hpa(3, 3, 20, able="ReadyForNewScale"))
    server.compact()
    async with watching(server, tmp_path, collector, deletion_s=1, ready_s=30):
        await until(lambda: len(collector.sent) == 3, "three traces")
        await asyncio.sleep(0.5)
    assert len(set(collector.ids())) == 3
    told = sorted(
        (s[0].start_time, s[0].attributes[a.REPLICAS_CURRENT], s[0].attributes[a.REPLICAS_DESIRED])
        for s in collector.sent
    )
    assert told == [(ns(1), 1, 2), (ns(10), 2, 4), (ns(20), 4, 3)]


async def test_a_trace_that_the_collector_did_not_take_is_sent_again_the_same(server, tmp_path):
    collector = Collector()
    collector.refuses = True
    async with watching(server, tmp_path, collector) as watcher:
        await ready(server)
        await scale(server, 1, 2, 1)
        await server.put(PODS, pod("vllm-b", 1, 2, 3, 4))
        failed = lambda: watcher.registry.get_sample_value("llmtrace_autoscale_failures_total", {"part": "collector"})  # noqa: E731
        await until(lambda: bool(failed()), "a refusal")
        assert "vllm-b" in state(server)
    collector.refuses = False
    async with watching(server, tmp_path, collector):
        await until(lambda: bool(collector.sent), "the trace")
        await asyncio.sleep(0.5)
    assert len(collector.sent) == 1


async def test_an_api_server_that_goes_and_comes_costs_no_decision(server, tmp_path):
    collector = Collector()
    async with watching(server, tmp_path, collector):
        await ready(server)
        server.down = True
        await server.end_watches()
        await scale(server, 1, 2, 1)
        await scale(server, 2, 3, 16)
        await server.put(PODS, pod("vllm-b", 1, 2, 3, 4))
        await server.put(PODS, pod("vllm-c", 16, 17, 18, 19))
        await asyncio.sleep(0.5)
        server.down = False
        await until(lambda: len(collector.sent) == 2, "both traces")
    assert len(set(collector.ids())) == 2


async def test_one_of_two_watchers_works_and_the_other_takes_over(server, tmp_path):
    collector = Collector()
    async with watching(server, tmp_path, collector, "two") as second:
        async with watching(server, tmp_path, collector, "one") as first:
            await ready(server)
            leading = [w.registry.get_sample_value("llmtrace_autoscale_leader") for w in (first, second)]
            assert sorted(leading) == [0.0, 1.0]
            await scale(server, 1, 2, 1)
            await server.put(PODS, pod("vllm-b", 1, 2, 3, 4))
            await until(lambda: bool(collector.sent), "the trace")
        await until(lambda: leads(server, "two"), "the other")
        await scale(server, 2, 3, 16)
        await server.put(PODS, pod("vllm-c", 16, 17, 18, 19))
        await until(lambda: len(collector.sent) == 2, "its trace")
        await asyncio.sleep(0.5)
    assert len(set(collector.ids())) == len(collector.sent) == 2
    # Given back, so that the next need not wait for its end.
    assert leads(server, "")


async def test_a_watcher_whose_state_another_has_written_stops_leading(server, tmp_path):
    collector = Collector()
    async with watching(server, tmp_path, collector) as watcher:
        await ready(server)
        other = dict(server.objects[STATE]["llmtrace-autoscale"])
        await server.put(STATE, other)
        await scale(server, 1, 2, 1)
        await until(lambda: watcher.registry.get_sample_value("llmtrace_autoscale_leader") == 0, "the end of its term")


async def test_a_watcher_that_hung_longer_than_its_lease_lasts_sends_nothing(server, tmp_path, monkeypatch):
    hangs = asyncio.Event()

    async def never(_: Lease) -> bool:
        hangs.set()
        await asyncio.Event().wait()
        return False

    collector = Collector()
    async with watching(server, tmp_path, collector) as watcher:
        await ready(server)
        monkeypatch.setattr(Lease, "_try", never)
        await hangs.wait()
        assert watcher._lease.held
        monkeypatch.setattr(watcher._lease, "_renewed", -math.inf)
        assert not watcher._lease.held
        await scale(server, 1, 2, 1)
        await server.put(PODS, pod("vllm-b", 1, 2, 3, 4))
        await until(lambda: '"outcome":"ready"' in state(server), "the replica in the state")
        await asyncio.sleep(1.5)
    assert collector.sent == []


async def test_a_state_that_cannot_be_read_is_one_sentence(server, tmp_path):
    await server.put(STATE, {"metadata": {"name": "llmtrace-autoscale"}, "data": {"state.json": '{"x": 1}'}})
    collector = Collector()
    with pytest.raises(UserError, match="delete that ConfigMap"):
        async with watching(server, tmp_path, collector):
            await until(lambda: leads(server, ""), "the end")
