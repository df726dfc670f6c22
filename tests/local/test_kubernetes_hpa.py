"""The watcher beside a plain HorizontalPodAutoscaler, which no ScaledObject owns and no KEDA knows.

Real and played are the same as in test_kubernetes_scaling.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from example_scaling import REPORTS
from kubernetes_load import QUEUE
from kubernetes_plane import NAMESPACE, Plane
from loopback import until
from test_kubernetes_scaling import HPA, NAME, WAIT_S, Scene, against_scrapes, answered, numbers, root, stage

from llmtrace.semconv import attributes as a

pytestmark = pytest.mark.timeout(300)


def install_hpa(plane: Plane) -> None:
    """An HPA on the reports' queue, one for each replica."""
    metric = {"name": QUEUE, "selector": {"matchLabels": {"model_name": REPORTS}}}
    target = {"type": "AverageValue", "averageValue": "1"}
    plane.call("POST", HPA, {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "queue", "namespace": NAMESPACE},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
            "minReplicas": 1,
            "maxReplicas": 4,
            "metrics": [{"type": "External", "external": {"metric": metric, "target": target}}],
        },
    })  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Up to three, and down to one."""
    query = f'sum({QUEUE}{{namespace="{NAMESPACE}",model_name="{REPORTS}"}})'
    with stage(tmp_path_factory.mktemp("kubernetes"), {QUEUE: query}, install_hpa) as found:
        with found.watcher(1):
            until(lambda: '"size":1' in found.state(), "the watcher's first look", WAIT_S, poll_s=0.2)
            found.scaled(3, 3)
            until(lambda: len(found.decisions()) == 1, "the way up", WAIT_S, poll_s=0.2)
            found.scaled(1, 1)
            until(lambda: len(found.decisions()) == 2, "the way down", WAIT_S, poll_s=0.2)
            until(lambda: '"decisions":[]' in found.state(), "every trace", WAIT_S, poll_s=0.2)
        yield found


def test_the_traces_are_the_changes_that_the_api_server_made(scene: Scene):
    changes = scene.recorder.changes
    assert [numbers(t) for t in scene.decisions()] == [(c.before, c.after) for c in changes] == [(1, 3), (3, 1)]


def test_the_scaler_is_the_hpa_and_its_query_what_it_asks_the_metrics_api_for(scene: Scene):
    for trace in scene.decisions():
        told = root(trace).attributes
        assert (told[a.SCALER_KIND], told[a.SCALER_NAME]) == ("HorizontalPodAutoscaler", f"{NAMESPACE}/queue")
        assert (told[a.SCALE_METRIC], told[a.SCALE_QUERY]) == (QUEUE, f'{QUEUE}{{model_name="{REPORTS}"}}')


def test_it_links_to_the_requests_that_were_counted(scene: Scene):
    up = scene.decisions()[0]
    counted = scene.counted(scene.recorder.changes[0])
    assert len(counted) == root(up).attributes[a.SCALE_VALUE] == 3
    assert counted <= {link.trace_id for link in root(up).links}
    assert against_scrapes(scene)[1] == 1.0


def test_the_answer_finds_them(scene: Scene):
    found = answered(scene)
    assert (found.attribution.precision, found.attribution.recall) == (1.0, 1.0)
    assert [c.name for c in found.checks if c.disagreements] == []
