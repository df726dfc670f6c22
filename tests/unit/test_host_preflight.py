"""The checks of a host, one by one; what they say is pinned where a person needs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llmtrace.deploy.playbook import playbooks_dir

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\n'
V1 = "#subsys_name hierarchy num enabled\n" + "".join(
    f"{name} 1 1 1\n" for name in ("cpu", "cpuacct", "cpuset", "memory", "devices", "pids")
)
SWAPS = "Filename Type Size Used Priority\n"


@pytest.fixture(scope="module")
def preflight() -> ModuleType:
    path = playbooks_dir() / "plugins/modules/llmtrace_host_preflight.py"
    spec = importlib.util.spec_from_file_location("llmtrace_host_preflight", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpu-1", "a", "n" * 63])
def test_names_of_nodes(preflight: ModuleType, name: str) -> None:
    assert not [*preflight.check_name(name)]


@pytest.mark.parametrize("name", ["GPU-1", "gpu_1", "-gpu", "gpu-", "", "n" * 64, "gpu.1\n"])
def test_what_is_no_name_of_a_node(preflight: ModuleType, name: str) -> None:
    assert len([*preflight.check_name(name)]) == 1


def test_system(preflight: ModuleType) -> None:
    def wrong(release: str, machine: str = "x86_64", kernel: str = "6.1.0-40-amd64") -> str:
        return " ".join(s for s in preflight.check_system(release, DEBIAN, machine, kernel) if "systemd does" not in s)

    assert wrong("bookworm") == ""
    assert wrong("") == ""
    assert "Debian GNU/Linux 12 (bookworm), and the bundle's packages are for trixie" in wrong("trixie")
    assert "its processor is riscv64" in wrong("", machine="riscv64")
    assert "its kernel is 5.10.0, and the cluster's network needs 5.13" in wrong("", kernel="5.10.0")
    assert wrong("", kernel="5.13.0") == ""


def test_control_groups_of_either_version(preflight: ModuleType) -> None:
    assert not [*preflight.check_kernel("nodev overlay", V1, "")]
    assert not [*preflight.check_kernel("nodev overlay", "", "cpuset cpu io memory pids")]
    off = V1.replace("memory 1 1 1", "memory 1 1 0")
    assert "lacks the cgroup controllers memory" in next(preflight.check_kernel("overlay", off, ""))
    assert "lacks the cgroup controllers memory" in next(preflight.check_kernel("overlay", V1, "cpuset cpu pids"))


def test_swap(preflight: ModuleType) -> None:
    used = SWAPS + "/dev/dm-1 partition 8388604 0 -2\n"
    assert not [*preflight.check_swap(False, SWAPS)]
    assert not [*preflight.check_swap(True, used)]
    assert "it swaps to /dev/dm-1, which" in next(preflight.check_swap(False, used))


@pytest.mark.parametrize(
    ("offset", "words"),
    [(0.4, ""), (-0.4, ""), (None, ""), (5.02, "5.0 s ahead of"), (-7.3, "7.3 s behind")],
)
def test_clock(preflight: ModuleType, offset: float | None, words: str) -> None:
    found = " ".join(preflight.check_clock(offset, 0.5))
    assert words in found
    assert bool(found) == bool(words)


def test_disk(preflight: ModuleType, tmp_path: Path) -> None:
    free = {"/var/lib/kubelet": 3 << 30, "/var/lib/containerd": 50 << 30}
    (sentence,) = preflight.check_disk(40, free)
    assert sentence.startswith("/var/lib/kubelet has 3.0 GiB of free space and needs 40")
    assert preflight.free_bytes(str(tmp_path / "not/there/yet")) == pytest.approx(
        preflight.free_bytes(str(tmp_path)), rel=0.05
    )


def test_ports(preflight: ModuleType) -> None:
    ports = {"10250": "kubelet", "6443": "the API server"}
    assert not [*preflight.check_ports(ports, joined=True, is_busy=lambda port: True)]
    (sentence,) = preflight.check_ports(ports, joined=False, is_busy=lambda port: port == 6443)
    assert sentence.startswith("port 6443, for the API server, is in use")
