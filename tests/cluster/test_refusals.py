"""What a person reads where hosts, inventory or bundle are not right. Nothing was changed on the hosts then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import Cluster
from machines import GUEST, run

pytestmark = pytest.mark.timeout(900, func_only=True)


def refused(cluster: Cluster, *sentences: str, **arguments: object) -> None:
    played = cluster.play("site.yml", **arguments)  # type: ignore[arg-type]
    assert played.code != 0, played.text
    for sentence in sentences:
        assert sentence in played.words, played.text
    assert not any(played.changes.values()), played.text
    assert "Traceback" not in played.text


def test_a_key_that_a_host_does_not_know(cluster: Cluster, tmp_path: Path) -> None:
    key = tmp_path / "other"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    refused(
        cluster,
        "gpu-1 (10.222.0.12) does not let installer in by SSH",
        "Permission denied",
        "correct ansible_host, ansible_user or ansible_ssh_private_key_file in the inventory",
        ansible_ssh_private_key_file=str(key),
    )


def test_a_user_without_sudo(cluster: Cluster) -> None:
    refused(
        cluster, f"gpu-2: {GUEST} may not use sudo without a password", "allow it in /etc/sudoers.d", ansible_user=GUEST
    )


@contextmanager
def changed(cluster: Cluster, name: str, do: str, undo: str) -> Iterator[None]:
    machine = cluster.machine(name)
    cluster.lab.on(machine, do)
    try:
        yield
    finally:
        cluster.lab.on(machine, undo)


def test_a_host_with_swap(cluster: Cluster) -> None:
    # The kernel is this machine's: the host only believes that it swaps.
    do = r"printf 'Filename Type Size\n/swapfile file 1\n' > /run/swaps; mount --bind /run/swaps /proc/swaps"
    with changed(cluster, "gpu-1", do, "umount /proc/swaps"):
        refused(cluster, "gpu-1: it swaps to /swapfile, which makes latencies meaningless: `swapoff -a`")


def test_a_host_whose_clock_is_off(cluster: Cluster) -> None:
    # The clock is this machine's as well: the host's `date` is what is wrong.
    do = """
        echo '#!/bin/sh' > /usr/local/bin/date
        echo 'exec /usr/bin/date -d "now 5 sec" "$@"' >> /usr/local/bin/date
        chmod +x /usr/local/bin/date
    """
    with changed(cluster, "gpu-2", do, "rm /usr/local/bin/date"):
        refused(cluster, "gpu-2: its clock is 5.0 s ahead of this machine's", "let chrony or systemd-timesyncd keep")


def test_a_host_with_a_full_disk(cluster: Cluster) -> None:
    do = "mkdir -p /var/lib/kubelet; mount -t tmpfs -o size=16m tmpfs /var/lib/kubelet"
    with changed(cluster, "gpu-1", do, "umount /var/lib/kubelet; rmdir /var/lib/kubelet"):
        refused(cluster, "gpu-1: /var/lib/kubelet has 0.0 GiB of free space and needs 5")


def test_a_port_that_is_in_use(cluster: Cluster) -> None:
    do = "systemd-run --quiet --unit=other python3 -m http.server 10250"
    with changed(cluster, "gpu-1", do, "systemctl stop other"):
        refused(cluster, "gpu-1: port 10250, for kubelet, is in use: stop what listens there")


def test_a_group_with_a_typo(cluster: Cluster, tmp_path: Path) -> None:
    inventory = cluster.lab.inventory(cluster.variables())
    inventory["wrokers"] = inventory.pop("workers")
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps(inventory))
    refused(
        cluster,
        "groups are control_plane, wrokers, and site.yml knows",
        "(hosts in none of them: gpu-1, gpu-2)",
        inventory=path,
    )


def test_no_bundle(cluster: Cluster, tmp_path: Path) -> None:
    refused(cluster, f"there is no bundle in {tmp_path}: make one with", bundle=str(tmp_path))


def test_a_bundle_that_lacks_an_image(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(cluster.bundle, tmp_path / "bundle", copy_function=lambda source, to: Path(to).symlink_to(source))
    lost = next((tmp_path / "bundle/images").glob("*coredns*"))
    lost.unlink()
    refused(cluster, f"lacks images/{lost.name}, which its bundle.json lists", bundle=str(tmp_path / "bundle"))


def test_an_upgrade_of_hosts_that_are_no_nodes(cluster: Cluster) -> None:
    played = cluster.play("upgrade.yml")
    assert played.code != 0
    assert "gpu-1 is no node of a running cluster, as cp-1 sees it" in played.words
    assert "bring it there with site.yml, then upgrade" in played.words
