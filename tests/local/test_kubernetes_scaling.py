"""The watcher beside a real HPA controller: its traces agree with what the API server says has happened.

Real: etcd, kube-apiserver, kube-controller-manager (HPA, Deployment, ReplicaSet), authorisation by the Role and
RoleBinding of manifests/base/autoscale, the ScaledObject of manifests/scenarios/autoscaling, Prometheus, the trace
store, the watcher as a process, OTLP. Played by the test: the picker (so many requests wait, with their traces), KEDA
(its HPA, and the external metrics API), scheduler, kubelet and vLLM (the test writes the pods' status as a kubelet
would, and vLLM's spans; no container runs).
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from example_scaling import REPORTS
from kubernetes_load import CHATS, LONGEST_S, QUEUE, Load, Sink
from kubernetes_metrics import GROUP, Adapter, prometheus_of
from kubernetes_plane import NAMESPACE, WATCHER, Nodes, Plane, Running, control_plane
from loopback import Receiver, free_port, receiving, until
from store_process import start as start_store

from bench.processes import process
from llmtrace.autoscale.kubernetes.api import Api, Kind, follow
from llmtrace.autoscale.kubernetes.cluster import PODS
from llmtrace.autoscale.kubernetes.objects import Object
from llmtrace.scenarios.autoscaling.answer import AutoscalingAnswer, answer
from llmtrace.semconv import attributes as a
from llmtrace.traces.demand import stay
from llmtrace.traces.model import Span, Trace

MANIFESTS = Path(__file__).parents[2] / "manifests"
NAME = "model-server"
HPA = f"/apis/autoscaling/v2/namespaces/{NAMESPACE}/horizontalpodautoscalers"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
SCALED_OBJECT = f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects"
WAIT_S = 60
GRACE_S = 20
SAMPLE_AGE_S = 5
SECOND = 10**9
pytestmark = pytest.mark.timeout(420)

DEPLOYMENT_OBJECT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": NAME, "namespace": NAMESPACE},
    "spec": {
        "replicas": 1,
        "selector": {"matchLabels": {"app": "vllm"}},
        "template": {
            "metadata": {"labels": {"app": "vllm"}},
            "spec": {
                "terminationGracePeriodSeconds": GRACE_S,
                "containers": [{"name": "vllm", "image": "vllm", "resources": {"limits": {"nvidia.com/gpu": "2"}}}],
            },
        },
    },
}
# What it may hold is looked at by manifests.checks.
DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "scaledobjects.keda.sh"},
    "spec": {
        "group": "keda.sh",
        "scope": "Namespaced",
        "names": {"plural": "scaledobjects", "kind": "ScaledObject"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def scaled_object() -> dict[str, Any]:
    """The scenario's ScaledObject, for the load's model, with fewer replicas and shorter times."""
    text = (MANIFESTS / "scenarios" / "autoscaling" / "modelServer-scaledObject.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text.replace("Qwen3-32B", REPORTS))
    found["spec"]["maxReplicaCount"] = 4
    behavior = found["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    behavior["scaleDown"]["stabilizationWindowSeconds"] = 5
    behavior["scaleUp"]["policies"] = [{"type": "Pods", "value": 4, "periodSeconds": 15}]
    return found


def keda_metrics(scaled: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The triggers, with the names that KEDA gives their metrics."""
    return [(f"s{number}-prometheus", trigger) for number, trigger in enumerate(scaled["spec"]["triggers"])]


def keda_hpa(scaled: dict[str, Any]) -> dict[str, Any]:
    """The HPA that KEDA's operator makes of a ScaledObject (keda/controllers/keda/hpa.go)."""
    spec, name = scaled["spec"], scaled["metadata"]["name"]
    selector = {"matchLabels": {"scaledobject.keda.sh/name": name}}
    about = {key: scaled[key] for key in ("apiVersion", "kind")} | {"name": name, "uid": scaled["metadata"]["uid"]}
    metrics = [
        {
            "type": "External",
            "external": {
                "metric": {"name": metric, "selector": selector},
                "target": {"type": "AverageValue", "averageValue": trigger["metadata"]["threshold"]},
            },
        }
        for metric, trigger in keda_metrics(scaled)
    ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {
            "name": spec["advanced"]["horizontalPodAutoscalerConfig"]["name"],
            "namespace": NAMESPACE,
            "ownerReferences": [about | {"controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {
            "scaleTargetRef": spec["scaleTargetRef"],
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "metrics": metrics,
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }


@dataclass(frozen=True)
class Change:
    """The number of replicas changed, as the API server was seen to say."""

    time_s: float
    before: int
    after: int


class Recorder(threading.Thread):
    """Looks at the Deployment ten times a second, whatever the watcher does."""

    def __init__(self, plane: Plane) -> None:
        super().__init__(daemon=True)
        self._plane = plane
        self.changes: list[Change] = []
        self._ended = threading.Event()

    def run(self) -> None:
        last: int | None = None
        while not self._ended.wait(0.1):
            try:
                now = int(self._plane.call("GET", f"{DEPLOYMENT}/{NAME}")["spec"]["replicas"])
            except (httpx.HTTPError, KeyError):
                continue
            if last is not None and now != last:
                self.changes.append(Change(time.time(), last, now))
            last = now

    def close(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Scene:
    """Everything that runs. ``version`` is that of the pods before anything happened."""

    running: Running
    load: Load
    asked: list[float]
    nodes: Nodes
    recorder: Recorder
    receiver: Receiver
    store: str
    folder: Path
    version: str

    @property
    def plane(self) -> Plane:
        return self.running.plane

    @contextmanager
    def watcher(self, number: int, lease_s: int = 4) -> Iterator[Any]:
        command = [
            sys.executable, "-m", "llmtrace.autoscale.kubernetes", f"--kubeconfig={self.plane.kubeconfig(WATCHER)}",
            f"--namespace={NAMESPACE}", "--own-namespace=llmtrace", f"--identity=watcher-{number}",
            f"--store={self.store}", f"--sample-age={SAMPLE_AGE_S}s", "--settle=8s", "--first-request-timeout=20s",
            f"--lease-duration={lease_s}s", "--port=0",
        ]  # fmt: skip
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": self.receiver.url}
        with process(command, self.folder / f"watcher-{number}.log", environment) as child:
            yield child

    def state(self) -> str:
        found = self.plane.call("GET", "/api/v1/namespaces/llmtrace/configmaps/llmtrace-autoscale")
        return str(found.get("data", {}).get("state.json", ""))

    def replicas(self) -> tuple[int, int]:
        found = self.plane.call("GET", f"{DEPLOYMENT}/{NAME}")
        return int(found["spec"]["replicas"]), int(found.get("status", {}).get("readyReplicas", 0))

    def log(self, number: int) -> str:
        return (self.folder / f"watcher-{number}.log").read_text()

    def scaled(self, waiting: int, number: int) -> None:
        """Let so many requests wait, until so many replicas are ready."""
        self.load.wait(waiting)
        until(lambda: self.replicas() == (number, number), f"{number} replicas", WAIT_S, poll_s=0.2)

    def counted(self, change: Change) -> frozenset[str]:
        """The reports that Prometheus had counted when the HPA last asked before a change."""
        asked = max(q for q in self.asked if q < change.time_s)
        return max((s for s in self.load.scrapes if s[0] < asked), key=lambda s: s[0])[1]

    def decisions(self) -> list[Trace]:
        traces = [self.receiver.trace(i) for i in self.receiver.trace_ids()]
        found = [t for t in traces if t.spans and root(t).attributes[a.SCALE_DIRECTION] != a.SCALE_HOLD]
        return sorted(found, key=lambda t: root(t).start_ns)


def root(trace: Trace) -> Span:
    return next(s for s in trace.spans if s.name == a.DECISION_SPAN)


def numbers(trace: Trace) -> tuple[int, int]:
    told = root(trace).attributes
    return int(str(told[a.REPLICAS_CURRENT])), int(str(told[a.REPLICAS_DESIRED]))


@contextmanager
def trace_store(folder: Path) -> Iterator[str]:
    port = free_port()
    child = start_store(folder / "traces.duckdb", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(20)


def install(plane: Plane, port: int, metric: str) -> None:
    """Namespaces, the metric's API at ``port``, the watcher's permissions, and what is scaled."""
    for name in (NAMESPACE, "llmtrace"):
        plane.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    plane.call("POST", "/api/v1/namespaces/default/services", {
        "metadata": {"name": "metrics"},
        "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]},
    })  # fmt: skip
    plane.call("POST", "/apis/apiregistration.k8s.io/v1/apiservices", {
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "group": "external.metrics.k8s.io", "version": "v1beta1", "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100, "versionPriority": 100,
            "service": {"namespace": "default", "name": "metrics", "port": port},
        },
    })  # fmt: skip
    for path in sorted((MANIFESTS / "base" / "autoscale").glob("*-role*.yaml")):
        item = yaml.safe_load(path.read_text())
        folder = (
            f"/apis/rbac.authorization.k8s.io/v1/namespaces/{item['metadata']['namespace']}/{item['kind'].lower()}s"
        )
        plane.call("POST", folder, item)
    until(lambda: plane.serves(f"/apis/{GROUP}/namespaces/{NAMESPACE}/{metric}"), "the metric", WAIT_S, poll_s=0.2)
    plane.call("POST", DEPLOYMENT, DEPLOYMENT_OBJECT)


def install_scaled_object(plane: Plane) -> None:
    """The ScaledObject, and the HPA that KEDA would make of it."""
    plane.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", DEFINITION)
    until(lambda: plane.serves(SCALED_OBJECT), "ScaledObjects", WAIT_S, poll_s=0.2)
    plane.call("POST", HPA, keda_hpa(plane.call("POST", SCALED_OBJECT, scaled_object())))


@contextmanager
def stage(folder: Path, queries: Mapping[str, str], scaler: Callable[[Plane], None]) -> Iterator[Scene]:
    """Everything but the watcher: the HPA asks for the metrics of ``queries``; ``scaler`` installs it."""
    with ExitStack() as stack:
        running = stack.enter_context(control_plane(folder))
        receiver = stack.enter_context(receiving())
        store = stack.enter_context(trace_store(folder))
        sink = Sink(store)
        load = Load(sink)
        load.start()
        stack.callback(load.close)
        client = stack.enter_context(prometheus_of(load.port, folder / "prometheus"))
        adapter = Adapter(folder / "certificate.pem", folder / "key.pem", client, queries)
        stack.callback(adapter.close)
        install(running.plane, adapter.port, next(iter(queries)))
        scaler(running.plane)
        path = f"/api/v1/namespaces/{NAMESPACE}/pods"
        version = running.plane.call("GET", path)["metadata"]["resourceVersion"]
        nodes, recorder = Nodes(running.plane, sink), Recorder(running.plane)
        for thread in (nodes, recorder):
            thread.start()
            stack.callback(thread.close)
        found = Scene(running, load, adapter.asked, nodes, recorder, receiver, store, folder, version)
        until(lambda: found.replicas() == (1, 1), "the first replica", WAIT_S, poll_s=0.2)
        yield found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scaler's work, and what watchers may meet.

    Up, while the first is killed; up while nobody watches; down while the API server restarts below the second; up to
    the limit while the third hangs and the fourth takes over; down when the third is back and the fourth is gone.
    """
    queries = {metric: trigger["metadata"]["query"] for metric, trigger in keda_metrics(scaled_object())}
    with stage(tmp_path_factory.mktemp("kubernetes"), queries, install_scaled_object) as found:
        running, load = found.running, found.load
        with found.watcher(1) as first:
            until(lambda: '"size":1' in found.state(), "the watcher's first look", WAIT_S, poll_s=0.2)
            load.wait(2)
            until(lambda: '"desired":2' in found.state(), "a decision in the state", WAIT_S, poll_s=0.05)
            # With a replica that is being started.
            first.send_signal(signal.SIGKILL)
            first.wait()
        found.scaled(2, 2)
        found.scaled(3, 3)
        with found.watcher(2, lease_s=60):
            until(lambda: len(found.decisions()) == 2, "what was missed", WAIT_S, poll_s=0.2)
            running.stop_api()
            load.wait(1)
            time.sleep(1)
            running.start_api()
            until(lambda: found.replicas() == (1, 1), "one replica", WAIT_S, poll_s=0.2)
            until(lambda: len(found.decisions()) == 3, "the way down", WAIT_S, poll_s=0.2)
        with found.watcher(3) as third:
            until(lambda: "watcher-3 leads" in found.log(3), "the next watcher", WAIT_S, poll_s=0.2)
            with found.watcher(4):
                load.wait(9)
                until(lambda: '"desired":4' in found.state(), "a decision in the state", WAIT_S, poll_s=0.05)
                third.send_signal(signal.SIGSTOP)
                until(lambda: found.replicas() == (4, 4), "four replicas", WAIT_S, poll_s=0.2)
                until(lambda: len(found.decisions()) == 4, "the other's trace", WAIT_S, poll_s=0.2)
                third.send_signal(signal.SIGCONT)
                until(lambda: "leads no longer" in found.log(3), "the end of its term", WAIT_S, poll_s=0.2)
            found.scaled(2, 2)
            until(lambda: len(found.decisions()) == 5, "the last trace", WAIT_S, poll_s=0.2)
            until(lambda: '"decisions":[]' in found.state(), "every trace", WAIT_S, poll_s=0.2)
        yield found


def test_the_traces_are_the_changes_that_the_api_server_made_in_order(scene: Scene):
    assert [numbers(t) for t in scene.decisions()] == [(c.before, c.after) for c in scene.recorder.changes]
    assert [c.after for c in scene.recorder.changes] == [2, 3, 1, 4, 2]


def test_their_times_are_those_of_the_changes_within_a_second(scene: Scene):
    for trace, change in zip(scene.decisions(), scene.recorder.changes, strict=True):
        # Whole seconds, cut off: up to one before; the recorder looks ten times a second.
        assert -0.3 <= change.time_s - root(trace).start_ns / SECOND <= 1.3, (trace, change)


def test_they_agree_with_the_events_of_the_hpa(scene: Scene):
    told = set()
    for event in scene.plane.items("events"):
        if event["reason"] == "SuccessfulRescale":
            said = re.fullmatch(r"New size: (\d+); reason: (.*)", event["message"])
            assert said
            told.add((int(said[1]), said[2]))
    assert {(numbers(t)[1], root(t).attributes[a.SCALE_REASON]) for t in scene.decisions()} == told


def test_no_span_came_twice(scene: Scene):
    for trace in scene.decisions():
        ids = [s.span_id for s in trace.spans]
        assert len(ids) == len(set(ids))


def test_every_pod_has_its_replica_and_its_phases_within_a_second(scene: Scene):
    started = {}
    for trace in scene.decisions():
        current, desired = numbers(trace)
        replicas = [s for s in trace.spans if s.name == a.REPLICA_SPAN]
        assert len(replicas) == abs(desired - current), (current, desired, [s.attributes for s in replicas])
        if desired > current:
            started |= {str(s.attributes[a.REPLICA]): (trace, s) for s in replicas}
    first = next(iter(scene.nodes.seen))
    assert set(started) == set(scene.nodes.seen) - {first}
    for name, (trace, replica) in started.items():
        told = scene.nodes.seen[name]
        phases = {s.name: s for s in trace.spans if s.parent_id == replica.span_id}
        assert replica.attributes[a.OUTCOME] == a.OUTCOME_SERVED
        # Whole seconds, cut off.
        for span, what in ((a.SCHEDULE_SPAN, "scheduled"), (a.IMAGE_PULL_SPAN, "pulled"), (a.READY_SPAN, "ready")):
            assert -0.1 <= told[what] - phases[span].end_ns / SECOND <= 1.1, (name, what)
        # vLLM's own spans.
        for span, time_s in (
            (a.CONTAINER_START_SPAN, told["started"] + 0.1),
            (a.MODEL_LOAD_SPAN, told["started"] + 0.15),
            (a.FIRST_REQUEST_SPAN, told["ready"] + 0.2 + 0.3),
        ):
            assert phases[span].end_ns / SECOND == pytest.approx(time_s, abs=0.001), (name, span)
            assert phases[span].attributes[a.PHASE_SOURCE] == a.SOURCE_SPANS


def test_the_way_down_is_the_drain_of_the_pods_that_went(scene: Scene):
    ended = {name: told["ended"] for name, told in scene.nodes.seen.items() if "ended" in told}
    drained = {}
    for trace in scene.decisions():
        current, desired = numbers(trace)
        if desired < current:
            for replica in (s for s in trace.spans if s.name == a.REPLICA_SPAN):
                (drain,) = [s for s in trace.spans if s.parent_id == replica.span_id]
                drained[str(replica.attributes[a.REPLICA])] = drain
                assert replica.attributes[a.OUTCOME] == a.OUTCOME_DRAINED
    assert set(drained) == set(ended)
    for name, span in drained.items():
        assert span.name == a.DRAIN_SPAN
        late = span.end_ns / SECOND - ended[name]
        if span.attributes[a.PHASE_SOURCE] == a.SOURCE_PROBE:
            # It went while the API server was down: before the next look, and before its time was up.
            assert 0 <= late <= GRACE_S
        else:
            assert -1.1 <= late <= 0


def test_a_decision_that_was_watched_has_the_metrics_that_drove_it_and_its_limit(scene: Scene):
    (limited,) = [t for t in scene.decisions() if numbers(t) == (1, 4)]
    told = root(limited).attributes
    assert (told[a.SCALER_KIND], told[a.SCALER_NAME]) == ("ScaledObject", f"{NAMESPACE}/{NAME}")
    assert told[a.SCALE_METRIC] == "queue"
    assert told[a.SCALE_QUERY] == f'sum({QUEUE}{{namespace="{NAMESPACE}",model_name="{REPORTS}"}})'
    assert told[a.SCALE_VALUE] == pytest.approx(9)
    assert told[a.SCALE_LIMIT] == a.LIMITED_MAX
    assert told[a.REPLICAS_RECOMMENDED] == 9
    assert told[a.ACCELERATORS] == 2.0


def test_a_decision_links_to_the_requests_that_the_scaler_had_counted(scene: Scene):
    requests = {t.trace_id: s for t in scene.load.requests if (s := stay(t))}
    changes = dict(zip((t.trace_id for t in scene.decisions()), scene.recorder.changes, strict=True))
    for trace in scene.decisions():
        if root(trace).attributes[a.REPLICAS_DESIRED] == 3:
            continue  # Nobody saw its metrics.
        counted = scene.counted(changes[trace.trace_id])
        linked = {link.trace_id for link in root(trace).links}
        assert counted <= linked, trace
        assert counted
        assert {requests[i].model for i in linked} == {REPORTS}


def answered(scene: Scene) -> AutoscalingAnswer:
    traces = [*scene.load.requests, *(scene.receiver.trace(i) for i in scene.receiver.trace_ids())]
    return answer("run", traces)


def against_scrapes(scene: Scene) -> tuple[float, float]:
    """Precision and recall of the answer's drivers against the requests that were in the sample that the HPA decided
    on, of all decisions that added replicas and whose metrics were seen."""
    drivers: dict[str, set[str]] = {}
    found = answered(scene)
    for request_id, ids in found.led_to.items():
        for decision_id in ids:
            drivers.setdefault(decision_id, set()).add(request_id)
    changed = [d for d in found.decisions if d.current != d.desired]
    right = told = due = 0
    for decision, change in zip(changed, scene.recorder.changes, strict=True):
        if decision.desired > decision.current and decision.value is not None:
            counted = scene.counted(change)
            right += len(counted & drivers[decision.id])
            told += len(drivers[decision.id])
            due += len(counted)
    return right / told, right / due


def test_the_drivers_are_those_of_the_sample_and_their_neighbours(scene: Scene):
    """No trace tells when Prometheus looked: the window is as long as a sample may be old, and in it each place in the
    queue is taken by two or three requests after one another."""
    precision, recall = against_scrapes(scene)
    print(f"precision {precision:.2f}, recall {recall:.2f} against the very samples")
    assert recall == 1.0
    window_s = SAMPLE_AGE_S + 1  # the HPA's times are cut to seconds
    assert precision >= 1 / (2 + window_s / LONGEST_S)


def test_the_answer_finds_what_drove_the_scaler(scene: Scene):
    found = answered(scene)
    assert (found.attribution.precision, found.attribution.recall) == (1.0, 1.0)
    assert [c.name for c in found.checks if c.disagreements] == []
    changes = [(d.current, d.desired) for d in found.decisions if d.current != d.desired]
    assert changes == [(c.before, c.after) for c in scene.recorder.changes]
    (limited,) = [d for d in found.decisions if (d.current, d.desired) == (1, 4)]
    assert limited.drivers >= 9
    kinds = {k.kind: k for k in found.kinds}
    assert kinds["chats"].requests > CHATS
    assert kinds["chats"].drivers == 0


def test_the_watcher_may_read_what_it_watches_and_change_nothing_of_it(scene: Scene):
    review = "/apis/authorization.k8s.io/v1/subjectaccessreviews"

    def may(verb: str, group: str, resource: str, namespace: str = NAMESPACE, name: str = "") -> bool:
        asked = {"verb": verb, "group": group, "resource": resource, "namespace": namespace, "name": name}
        body = {"spec": {"user": "system:serviceaccount:llmtrace:autoscale", "resourceAttributes": asked}}
        return bool(scene.plane.call("POST", review, body)["status"]["allowed"])

    for group, resource in (
        ("", "pods"),
        ("", "events"),
        ("apps", "deployments"),
        ("autoscaling", "horizontalpodautoscalers"),
    ):
        assert may("watch", group, resource)
        assert not any(may(verb, group, resource) for verb in ("create", "update", "patch", "delete"))
    assert not may("get", "", "secrets")
    assert not may("watch", "", "pods", "default")
    assert may("update", "", "configmaps", "llmtrace", "llmtrace-autoscale")
    assert not may("update", "", "configmaps", "llmtrace", "other")


def test_the_watcher_was_refused_nothing(scene: Scene):
    # The second met the restarted API server, which refuses everything until it has read its own permissions.
    assert not any("403" in scene.log(number) for number in (1, 3, 4))


def test_one_watcher_led_at_a_time(scene: Scene):
    def terms(number: int) -> list[str]:
        return re.findall(rf"watcher-{number} (leads(?: no longer)?)", scene.log(number))

    assert [terms(number) for number in (1, 2, 3, 4)] == [
        ["leads"],
        ["leads"],
        ["leads", "leads no longer", "leads"],
        ["leads"],
    ]


async def test_what_the_api_server_no_longer_has_is_listed_again(scene: Scene):
    """It was restarted after this version of the pods, and remembers nothing from before: 410."""

    class Late(Api):
        lists = 0

        async def every(self, kind: Kind, namespace: str) -> tuple[list[Object], str]:
            self.lists += 1
            return ([], scene.version) if self.lists == 1 else await super().every(kind, namespace)

    class Sink:
        def __init__(self) -> None:
            self.listed: list[list[str]] = []

        def replace(self, _: Kind, items: Iterable[Object]) -> None:
            self.listed.append([item["metadata"]["name"] for item in items])

        def change(self, _: Kind, event: str, item: Object) -> None:
            raise AssertionError((event, item["metadata"]["name"]))

    sink, told = Sink(), []
    api = await Late.connect(scene.plane.kubeconfig(WATCHER))
    task = asyncio.create_task(follow(api, PODS, NAMESPACE, sink, lambda *said: told.append(said)))
    try:
        async with asyncio.timeout(WAIT_S):
            while len(sink.listed) < 2:
                await asyncio.sleep(0.1)
                assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await api.close()
    there = [pod["metadata"]["name"] for pod in scene.plane.items("pods")]
    assert len(there) == 2
    assert [sorted(names) for names in sink.listed] == [[], sorted(there)]
    assert told == []
