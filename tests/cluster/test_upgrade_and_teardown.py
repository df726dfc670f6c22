"""The cluster gets another version of Kubernetes, host by host, and is taken down, its hosts as they were."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import NEXT_VERSION, Cluster

pytestmark = pytest.mark.timeout(1800, func_only=True)

LEFT = """
ls -d /etc/kubernetes /etc/containerd/* /var/lib/kubelet /var/lib/etcd /var/lib/llmtrace /usr/local/bin/kube* \\
  /opt/cni/bin/bridge /etc/systemd/system/kubelet.service /var/log/pods 2>/dev/null || true
grep -lE '^(kube|etcd|containerd)' /proc/[0-9]*/comm || true
dpkg-query -W containerd runc 2>/dev/null || true
ip -brief link show cni0 2>/dev/null || true
ip route show root 10.244.0.0/16 || true
"""
UNSCHEDULABLE = "--output=jsonpath={.items[?(@.spec.unschedulable)].metadata.name}"
VERSIONS = "--output=jsonpath={.items[*].status.nodeInfo.kubeletVersion}"


def versions(cluster: Cluster) -> list[str]:
    """Of each node's kubelet."""
    return cluster.kubectl("get", "nodes", VERSIONS).split()


def test_an_upgrade_to_the_version_that_runs_changes_nothing(cluster: Cluster) -> None:
    played = cluster.play("upgrade.yml")
    assert played.code == 0, played.text
    assert set(played.changes.values()) == {0}, played.text


def test_an_upgrade_takes_one_host_after_the_other(cluster: Cluster, next_bundle: Path) -> None:
    # What the tests before left would take its time to go.
    cluster.kubectl("delete", "namespace", "llm-d", "--ignore-not-found", "--timeout=170s")
    newer = replace(cluster, bundle=next_bundle)
    drained: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            drained.add(newer.kubectl("get", "nodes", UNSCHEDULABLE, check=False))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        played = newer.play("upgrade.yml")
    finally:
        ended.set()
        watcher.join()
    assert played.code == 0, played.text
    assert versions(newer) == [f"v{NEXT_VERSION}"] * 3
    assert drained == {"", "gpu-1", "gpu-2"}
    assert newer.kubectl("get", "nodes", UNSCHEDULABLE) == ""
    assert all(newer.ready().values())
    print(f"three hosts upgraded in {played.seconds:.0f} s")


def test_after_an_upgrade_there_is_nothing_to_do(cluster: Cluster, next_bundle: Path) -> None:
    for playbook in ("upgrade.yml", "site.yml"):
        played = replace(cluster, bundle=next_bundle).play(playbook)
        assert played.code == 0, played.text
        assert set(played.changes.values()) == {0}, played.text


def test_an_older_bundle_is_refused(cluster: Cluster, next_bundle: Path) -> None:
    assert next_bundle.exists()
    played = cluster.play("site.yml")
    assert played.code != 0
    assert f"runs Kubernetes v{NEXT_VERSION}, and the bundle has " in played.words
    assert "upgrade the cluster, one host after the other, with playbooks/upgrade.yml" in played.words
    back = cluster.play("upgrade.yml")
    assert back.code != 0
    assert f"runs Kubernetes v{NEXT_VERSION}, and the bundle has the older " in back.words
    assert not any(back.changes.values()), back.text


def test_teardown_asks_first_and_leaves_nothing(cluster: Cluster) -> None:
    refused = cluster.play("teardown.yml")
    assert refused.code != 0
    assert "Nothing was removed" in refused.words
    assert all(cluster.ready().values())
    played = cluster.play("teardown.yml", confirm="yes")
    assert played.code == 0, played.text
    for machine in cluster.lab.machines:
        assert cluster.lab.on(machine, LEFT).strip() == "", machine.name
    print(f"three hosts torn down in {played.seconds:.0f} s")
    again = cluster.play("teardown.yml", confirm="yes")
    assert again.code == 0, again.text
    assert set(again.changes.values()) == {0}, again.text
