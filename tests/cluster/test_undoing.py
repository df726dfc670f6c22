"""The cluster is taken down, and its hosts are as they were."""

from __future__ import annotations

import pytest
from clusters import Cluster

pytestmark = pytest.mark.timeout(900)

LEFT = """
ls -d /etc/kubernetes /etc/containerd/* /var/lib/kubelet /var/lib/etcd /var/lib/llmtrace /usr/local/bin/kube* \\
  /opt/cni/bin/bridge /etc/systemd/system/kubelet.service 2>/dev/null || true
grep -lE '^(kube|etcd|containerd)' /proc/[0-9]*/comm || true
dpkg-query -W containerd runc 2>/dev/null || true
ip -brief link show cni0 2>/dev/null || true
"""


def test_teardown_asks_first_and_leaves_nothing(cluster: Cluster) -> None:
    refused = cluster.play("teardown.yml")
    assert refused.code != 0
    assert "Nothing was removed" in refused.words
    assert all(cluster.ready().values())
    played = cluster.play("teardown.yml", confirm="yes")
    assert played.code == 0, played.text
    for machine in cluster.lab.machines:
        assert cluster.lab.on(machine, LEFT).strip() == "", machine.name
    again = cluster.play("teardown.yml", confirm="yes")
    assert again.code == 0, again.text
