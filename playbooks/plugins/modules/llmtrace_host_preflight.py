#!/usr/bin/python
"""Ansible module: can this host be part of a cluster?

It runs on the host with the host's own Python, so it uses the standard library alone.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: llmtrace_host_preflight
short_description: Check that a host can be part of a cluster
description:
  - Looks, and changes nothing. Fails with one sentence for each thing that is wrong.
options:
  name:
    description: The host's name in the inventory, which its node gets.
    type: str
    required: true
  release:
    description: Debian release that the bundle's packages are for; empty where the host uses its own mirrors.
    type: str
    default: ""
  ports:
    description: TCP ports that Kubernetes will listen on, and what for.
    type: dict
    required: true
  disk_gib:
    description: Free space that the folders of containers and of pods need, in GiB.
    type: float
    required: true
  allow_swap:
    description: Whether the host may have swap.
    type: bool
    required: true
  clock_limit_s:
    description: Seconds that the clock may be off.
    type: float
    required: true
  clock_offset_s:
    description: Seconds that the clock is ahead of the control host's; the action of the same name measures it.
    type: float
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Check the host
  llmtrace_host_preflight:
    name: "{{ inventory_hostname }}"
    ports: {10250: kubelet}
    disk_gib: 40
    allow_swap: false
    clock_limit_s: 0.5
"""
RETURN = r"""
machine_id:
  description: The host's machine id; no two hosts may have the same.
  type: str
  returned: success
gpus:
  description: NVIDIA GPUs on its PCI bus.
  type: int
  returned: success
nvidia_driver:
  description: Version of the loaded NVIDIA driver; empty where there is none.
  type: str
  returned: success
rdma_devices:
  description: RDMA devices (InfiniBand or RoCE).
  type: list
  returned: success
"""

MACHINES = {"x86_64": "amd64"}
CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "pids")
CONTROLLERS_V2 = ("cpu", "cpuset", "memory", "pids")
OLDEST_KERNEL = (5, 13)
FOLDERS = ("/var/lib/containerd", "/var/lib/kubelet")
GIB = 1 << 30
NVIDIA = "0x10de"


def read(path):
    """Text of a file; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_name(name):
    """A node's name is a DNS label (RFC 1123)."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
        yield f"{name!r} cannot be a node's name: name the host in the inventory with a-z, 0-9 and - only"


def check_system(release, os_release, machine, kernel):
    """The bundle's programs and packages fit the system."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    codename = fields.get("VERSION_CODENAME", "").strip('"')
    named = fields.get("PRETTY_NAME", "an unknown system").strip('"')
    if machine not in MACHINES:
        yield f"its processor is {machine}, and the bundle's programs are for {', '.join(MACHINES)}: use such a host"
    if release and codename != release:
        yield f"it runs {named}, and the bundle's packages are for {release}: make one with bundle_packages=false"
    if tuple(map(int, re.findall(r"\d+", kernel)[:2])) < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        yield f"its kernel is {kernel}, and the cluster's network needs {oldest}: install a newer one"
    if not Path("/run/systemd/system").is_dir():
        yield "systemd does not run it: use a host that systemd boots"


def check_kernel(filesystems, v1, v2):
    """What containers need of the kernel: ``v1`` is /proc/cgroups, ``v2`` the controllers of cgroup v2 or empty."""
    if "overlay" not in filesystems.split() and not Path(f"/lib/modules/{platform.release()}").is_dir():
        yield "its kernel has no overlay file system: install a kernel with it, or its modules"
    enabled = {fields[0] for line in v1.splitlines() if len(fields := line.split()) == 4 and fields[3] == "1"}
    wanted, found = (CONTROLLERS_V2, set(v2.split())) if v2 else (CONTROLLERS, enabled)
    missing = [name for name in wanted if name not in found]
    if missing:
        yield f"its kernel lacks the cgroup controllers {', '.join(missing)}: enable them on the kernel's command line"


def check_swap(allowed, swaps):
    """No swap: ``swaps`` is /proc/swaps."""
    used = [line.split()[0] for line in swaps.splitlines()[1:] if line.strip()]
    if used and not allowed:
        yield (
            f"it swaps to {', '.join(used)}, which makes latencies meaningless: `swapoff -a` and take it out of "
            "/etc/fstab, or set cluster_allow_swap"
        )


def check_clock(offset_s, limit_s):
    """The clock is near the control host's."""
    if offset_s is not None and abs(offset_s) > limit_s:
        where = "ahead of" if offset_s > 0 else "behind"
        yield (
            f"its clock is {abs(offset_s):.1f} s {where} this machine's, and spans of one trace would be out of order "
            f"(limit {limit_s:g} s): let chrony or systemd-timesyncd keep both clocks"
        )


def free_bytes(folder):
    """Free space at a folder, or at the nearest one above that exists."""
    path = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def check_disk(needed_gib, free):
    """Space for images and pods; ``free`` is bytes by folder."""
    for folder, size in free.items():
        if size < needed_gib * GIB:
            yield (
                f"{folder} has {size / GIB:.1f} GiB of free space and needs {needed_gib:g}: free some, mount a larger "
                "disk there, or lower cluster_disk_gib"
            )


def busy(port):
    """Whether something listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def check_ports(ports, joined, is_busy=busy):
    """The ports are free, or the host is in a cluster already."""
    if joined:
        return
    for port, purpose in ports.items():
        if is_busy(int(port)):
            yield f"port {port}, for {purpose}, is in use: stop what listens there (`ss -ltnp sport = :{port}`)"


def devices():
    """What the host has for model servers."""
    found = Path("/sys/bus/pci/devices").glob("*") if Path("/sys/bus/pci/devices").is_dir() else []
    gpus = [
        path for path in found if read(path / "vendor").strip() == NVIDIA and read(path / "class").startswith("0x03")
    ]
    driver = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\S+)", read("/proc/driver/nvidia/version"))
    rdma = Path("/sys/class/infiniband")
    return {
        "gpus": len(gpus),
        "nvidia_driver": driver[1] if driver else "",
        "rdma_devices": sorted(path.name for path in rdma.iterdir()) if rdma.is_dir() else [],
    }


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "release": {"type": "str", "default": ""},
            "ports": {"type": "dict", "required": True},
            "disk_gib": {"type": "float", "required": True},
            "allow_swap": {"type": "bool", "required": True},
            "clock_limit_s": {"type": "float", "required": True},
            "clock_offset_s": {"type": "float"},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    joined = Path("/etc/kubernetes/kubelet.conf").exists()
    wrong = [
        *check_name(wanted["name"]),
        *check_system(wanted["release"], read("/etc/os-release"), platform.machine(), platform.release()),
        *check_kernel(read("/proc/filesystems"), read("/proc/cgroups"), read("/sys/fs/cgroup/cgroup.controllers")),
        *check_swap(wanted["allow_swap"], read("/proc/swaps")),
        *check_clock(wanted["clock_offset_s"], wanted["clock_limit_s"]),
        # What a host of the cluster has used is used well.
        *([] if joined else check_disk(wanted["disk_gib"], {folder: free_bytes(folder) for folder in FOLDERS})),
        *check_ports(wanted["ports"], joined),
    ]
    if wrong:
        module.fail_json(msg="\n".join(f"{wanted['name']}: {sentence}." for sentence in wrong))
    module.exit_json(changed=False, machine_id=read("/etc/machine-id").strip(), **devices())


if __name__ == "__main__":
    main()
