"""What is said of workloads that are not ready."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtrace.deploy import manifests
from llmtrace.deploy.manifests import Kubectl
from llmtrace.errors import UserError

TEXT = """
apiVersion: v1
kind: Namespace
metadata: {name: llm-d}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: model-server, namespace: llm-d}
"""


def deployment(ready: int, wanted: int, **status: Any) -> dict[str, Any]:
    return {
        "kind": "Deployment",
        "metadata": {"name": "model-server", "namespace": "llm-d", "generation": 2},
        "spec": {"replicas": wanted, "selector": {"matchLabels": {"app": "vllm"}}},
        "status": {"observedGeneration": 2, "readyReplicas": ready, "updatedReplicas": wanted, **status},
    }


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "model-server-1"}, "status": {"phase": "Pending", **status}}


def container(state: dict[str, Any], last: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": "vllm", "ready": False, "state": state, "lastState": last or {}}


def test_only_what_runs_pods_is_waited_for() -> None:
    assert manifests.workloads(TEXT) == [("Deployment", "llm-d", "model-server")]


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        (deployment(2, 2), (2, 2)),
        (deployment(1, 2), (1, 2)),
        (deployment(0, 0), (0, 0)),
        # The controller has not seen the change.
        (deployment(2, 2, observedGeneration=1), (0, 2)),
        # Old pods are ready, new ones are not there.
        (deployment(2, 2, updatedReplicas=0), (0, 2)),
        (
            {
                "kind": "DaemonSet",
                "metadata": {"generation": 1},
                "spec": {},
                "status": {
                    "observedGeneration": 1,
                    "desiredNumberScheduled": 3,
                    "updatedNumberScheduled": 3,
                    "numberAvailable": 1,
                },
            },
            (1, 3),
        ),
    ],
)
def test_how_far_a_workload_is(workload: dict[str, Any], expected: tuple[int, int]) -> None:
    assert manifests.progress(workload) == expected


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (pod(conditions=[{"type": "Ready", "status": "True"}]), None),
        (
            pod(
                conditions=[
                    {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
                ]
            ),
            "it has no node: 0/3 nodes: Insufficient nvidia.com/gpu",
        ),
        (
            pod(
                containerStatuses=[
                    container({"waiting": {"reason": "ErrImageNeverPull", "message": "image is not present"}})
                ]
            ),
            "container vllm: image is not present",
        ),
        (
            pod(
                containerStatuses=[
                    container(
                        {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
                        {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                    )
                ]
            ),
            "container vllm: back-off 10s; it ended with 137 (OOMKilled)",
        ),
        (
            pod(containerStatuses=[container({"running": {}})]),
            "container vllm runs and does not say that it is ready",
        ),
        (pod(), "it is Pending"),
    ],
)
def test_why_a_pod_is_not_ready(found: dict[str, Any], words: str | None) -> None:
    assert manifests.reason(found) == words


def test_what_is_not_ready_in_time_is_named_with_its_pods_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Kubectl, arguments: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        items = [pod(conditions=[], phase="Unknown")] if arguments[1] == "pods" else [deployment(1, 2)]
        return subprocess.CompletedProcess(arguments, 0, json.dumps({"items": items}), "")

    monkeypatch.setattr(Kubectl, "run", run)
    sentence = r"Deployment llm-d/model-server has 1 of 2 pods ready \(model-server-1: it is Unknown\)"
    with pytest.raises(UserError, match=sentence):
        manifests.wait(Kubectl(Path("kubectl"), Path("config")), TEXT, 0)


def test_no_kubectl_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: set cluster_kubectl"):
        Kubectl(tmp_path / "kubectl", tmp_path / "config").must(["version"])
