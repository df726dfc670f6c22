"""The cluster itself: stood up from nothing, left alone by a second run, healed by another."""

from __future__ import annotations

import time

import pytest
from clusters import Cluster

pytestmark = pytest.mark.timeout(1500, func_only=True)

PAUSE = "registry.k8s.io/pause:3.10.1"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: %(name)s}
spec:
  nodeName: %(node)s
  terminationGracePeriodSeconds: 0
  containers: [{name: pause, image: "%(image)s", imagePullPolicy: Never}]
"""


CONNECT = """
python3 - <<END
import socket
try:
    socket.create_connection(("%(address)s", %(port)d), 5)
    print("connected")
except OSError as error:
    print(type(error).__name__)
END
"""


def connect(cluster: Cluster, machine: str, address: str, port: int) -> str:
    return cluster.lab.on(cluster.machine(machine), CONNECT % {"address": address, "port": port}).strip()


def test_from_bare_hosts_to_ready_nodes(cluster: Cluster) -> None:
    played = cluster.play("site.yml")
    assert played.code == 0, played.text
    assert cluster.ready() == {"cp-1": True, "gpu-1": True, "gpu-2": True}
    assert cluster.kubeconfig.stat().st_mode & 0o777 == 0o600
    print(f"from bare hosts to ready nodes in {played.seconds:.0f} s")


def test_pods_run_and_reach_names_and_each_other(cluster: Cluster) -> None:
    for node in ("gpu-1", "gpu-2"):
        cluster.kubectl("apply", "--filename=-", text=POD % {"name": f"on-{node}", "node": node, "image": PAUSE})
    cluster.kubectl("wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s")
    cluster.kubectl("rollout", "status", "deployment/coredns", "--namespace=kube-system", "--timeout=120s")
    addresses = {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in cluster.get("pods")}
    # Nothing listens in the pods: an answer of theirs is a refusal. From the other host, it came over the routes.
    assert connect(cluster, "gpu-1", addresses["on-gpu-2"], 1) == "ConnectionRefusedError"
    assert connect(cluster, "gpu-2", addresses["on-gpu-1"], 1) == "ConnectionRefusedError"
    path = "--output=jsonpath={.spec.clusterIP}"
    service = cluster.kubectl("get", "service", "kube-dns", "--namespace=kube-system", path)
    assert connect(cluster, "gpu-1", service, 53) == "connected"
    cluster.kubectl("delete", "pod", "--all")


def test_a_second_run_changes_nothing(cluster: Cluster) -> None:
    played = cluster.play("site.yml")
    assert played.code == 0, played.text
    assert set(played.changes.values()) == {0}, played.text
    print(f"second run in {played.seconds:.0f} s")


def test_a_third_run_would_change_nothing_either(cluster: Cluster) -> None:
    played = cluster.play("site.yml", "--check", "--diff")
    assert played.code == 0, played.text
    assert set(played.changes.values()) == {0}, played.text


def test_a_worker_that_stopped_is_healed(cluster: Cluster) -> None:
    worker = cluster.machine("gpu-2")
    # An image is lost, as on a disk that was full, and the services stand still.
    cluster.lab.on(worker, f"ctr --namespace=k8s.io images remove {PAUSE}; systemctl stop kubelet containerd")
    assert until(lambda: not cluster.ready()["gpu-2"], 90)
    played = cluster.play("site.yml")
    assert played.code == 0, played.text
    assert cluster.ready()["gpu-2"]
    assert played.changes["gpu-2"] > 0
    assert played.changes["cp-1"] == 0
    assert PAUSE in cluster.lab.on(worker, "ctr --namespace=k8s.io images list --quiet").splitlines()


def test_a_worker_that_lost_its_disk_comes_back(cluster: Cluster) -> None:
    worker = cluster.machine("gpu-1")
    cluster.lab.replace(worker)
    assert until(lambda: not cluster.ready()["gpu-1"], 90)
    played = cluster.play("site.yml")
    assert played.code == 0, played.text
    assert cluster.ready() == {"cp-1": True, "gpu-1": True, "gpu-2": True}


def until(condition: object, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(2)
    return True
