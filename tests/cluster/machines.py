"""Machines for the test cluster: Debian in systemd-nspawn, in a network namespace of their own, reached by SSH.

They share this machine's kernel, its clock and its cgroup hierarchies, and nothing else. Needs root and cgroup v1, as
the kit's CI machine has it. What is made here is known by its name (``llmtrace-...``) and removed by :meth:`Lab.stop`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrace-kit"
NAMESPACE = "llmtrace-test"
NETWORK, GATEWAY, PREFIX = "10.222.0.0/24", "10.222.0.1", 24
SUBNETS = ("10.244.0.0/16", "10.96.0.0/12")
"""Of pods and of services, as a cluster has them by default."""
INSTALLER, GUEST = "installer", "guest"
"""Users of every machine: one may use sudo, one may not."""
PACKAGES = (
    *("systemd", "systemd-sysv", "systemd-container", "dbus", "udev", "openssh-server", "sudo", "python3"),
    *("iproute2", "ca-certificates", "libnss-myhostname"),
)
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
HIERARCHIES = Path("/sys/fs/cgroup")
BOOT_S, STOP_S = 60, 60

SETTINGS: Mapping[str, object] = {
    # One kernel for all machines, with cgroup v1 and without CAP_SYS_RESOURCE, on a small disk.
    "cluster_systemd_cgroups": False,
    "containerd_restrict_oom_score": True,
    "cluster_disk_gib": 5,
    "cluster_kubelet_configuration": {
        "failCgroupV1": False,
        "enforceNodeAllocatable": [],
        # In bytes, not in parts of a disk that is this machine's and may be nearly full.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi"},
    },
    # The number of connections is the kernel's, and so this machine's.
    "cluster_proxy_configuration": {"conntrack": {"maxPerCore": 0, "min": 0}},
    "cluster_ignore_preflight": [
        *("SystemVerification", "NumCPU", "Mem"),
        "FileContent--proc-sys-net-bridge-bridge-nf-call-iptables",
    ],
}


class LabError(Exception):
    """The machines cannot be made or do not answer; one sentence."""


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float = 60,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    text: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end; LabError with its last words where it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        input=text,
        env={**os.environ, **(environment or {})},
    )
    if check and done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise LabError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n" + "\n".join(words))
    return done


def base() -> Path:
    """Folder of the system that every machine is a copy of; made once with debootstrap, and kept in the cache."""
    folder = CACHE / "test-machine" / SUITE
    if folder.exists():
        return folder
    # Not NAME.partial, which `llmtrace up` would remove.
    partial = folder.with_suffix(".building")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    run(
        [
            "sh",
            "-ec",
            f"cd {partial}; apt-get download debootstrap; dpkg -x debootstrap_*.deb tools",
        ]
    )
    root = partial / "root"
    run(
        [
            partial / "tools/usr/sbin/debootstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            SUITE,
            root,
            MIRROR,
        ],
        timeout_s=600,
        environment={"DEBOOTSTRAP_DIR": str(partial / "tools/usr/share/debootstrap")},
    )
    for left in root.glob("var/cache/apt/archives/*.deb"):
        left.unlink()
    for left in root.glob("var/lib/apt/lists/*_*"):
        left.unlink()
    # No network but the cluster's: what is installed comes from the bundle.
    (root / "etc/apt/sources.list").write_text("")
    (root / "etc/machine-id").write_text("")
    for user in (INSTALLER, GUEST):
        run(["chroot", root, "useradd", "--create-home", "--shell=/bin/bash", user])
    # It fails at random where control groups are another machine's, and nobody reads what it records.
    (root / "etc/systemd/system/systemd-update-utmp-runlevel.service").symlink_to("/dev/null")
    (root / "etc/sudoers.d/installer").write_text(f"{INSTALLER} ALL=(ALL) NOPASSWD: ALL\n")
    root.replace(folder)
    shutil.rmtree(partial)
    return folder


@dataclass(frozen=True)
class Machine:
    """A machine of the lab. ``folder`` holds its root file system and what must not be on it (containerd's store)."""

    name: str
    address: str
    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def group(self) -> str:
        """Name of its control group in every hierarchy."""
        return f"llmtrace-{self.name}"

    def pid(self) -> int | None:
        """Process id of its systemd-nspawn; None where it does not run."""
        try:
            pid = int((self.folder / "pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if f"--machine={self.name}".encode() in command else None


class Lab:
    """Machines and their network. ``folder`` keeps the machines' disks, keys and logs.

    The machines see the folders in ``shared`` at the same path, and cannot write there.
    """

    def __init__(self, folder: Path, names: Sequence[str], shared: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.shared = shared
        self.machines = [Machine(name, f"10.222.0.{11 + i}", folder / name) for i, name in enumerate(names)]
        self.key = folder / "id_ed25519"
        self.known_hosts = folder / "known_hosts"

    def machine(self, name: str) -> Machine:
        return next(machine for machine in self.machines if machine.name == name)

    def start(self) -> None:
        """Make what is missing and boot what is down; LabError where that does not work."""
        if os.geteuid() != 0:
            raise LabError("The test cluster needs root, for namespaces and systemd-nspawn: run it as root.")
        if not (HIERARCHIES / "memory").is_dir():
            raise LabError("The test cluster needs control groups of version 1 (systemd.unified_cgroup_hierarchy=0).")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.key.exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "llmtrace-test", "-f", self.key])
        self._network()
        for machine in self.machines:
            if not machine.root.exists():
                self._make(machine)
        for machine in self.machines:
            if machine.pid() is None:
                self._boot(machine)
        for machine in self.machines:
            self._wait(machine)

    def inside(self, *command: str | Path) -> list[str]:
        """``command``, to be run in the lab's network."""
        return ["nsenter", f"--net=/run/netns/{NAMESPACE}", *map(str, command)]

    def ssh(self, machine: Machine, *command: str, user: str = INSTALLER) -> list[str]:
        """The command line that runs ``command`` on ``machine``."""
        options = [f"UserKnownHostsFile={self.known_hosts}", "BatchMode=yes", "ConnectTimeout=5"]
        return self.inside(
            *(
                "ssh",
                "-i",
                self.key,
                *(f"-o{option}" for option in options),
                f"{user}@{machine.address}",
                "--",
                *command,
            )
        )

    def on(self, machine: Machine, script: str, *, timeout_s: float = 60, check: bool = True) -> str:
        """Run a shell script on ``machine`` as root; return what it prints."""
        return run(self.ssh(machine, "sudo", "sh", "-e"), timeout_s=timeout_s, check=check, text=script).stdout

    def power_off(self, machine: Machine) -> None:
        """Stop ``machine`` as its administrator would, within STOP_S."""
        if machine.pid() is None:
            return
        run(self.ssh(machine, "sudo", "systemctl", "poweroff"), check=False, timeout_s=20)
        _until(lambda: machine.pid() is None, STOP_S)

    def replace(self, machine: Machine) -> None:
        """Give ``machine`` an empty disk, and boot it."""
        self.power_off(machine)
        self._release(machine)
        shutil.rmtree(machine.folder)
        self.known_hosts.write_text(
            "".join(line for line in self.known_hosts.open() if not line.startswith(f"{machine.address} "))
        )
        self.start()

    def stop(self, *, remove: bool = True) -> None:
        """Stop every machine and take the network down; with ``remove``, the disks too."""
        for machine in self.machines:
            self.power_off(machine)
            self._release(machine)
        if NAMESPACE in run(["ip", "netns", "list"]).stdout.split():
            run(["ip", "netns", "delete", NAMESPACE])
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _network(self) -> None:
        if NAMESPACE not in run(["ip", "netns", "list"]).stdout.split():
            run(["ip", "netns", "add", NAMESPACE])
        if run(self.inside("ip", "link", "show", "br0"), check=False).returncode:
            run(self.inside("ip", "link", "add", "br0", "type", "bridge"))
            run(self.inside("ip", "address", "add", f"{GATEWAY}/{PREFIX}", "dev", "br0"))
        for device in ("lo", "br0"):
            run(self.inside("ip", "link", "set", device, "up"))
        # Pods and services, by a worker.
        for subnet in SUBNETS:
            run(self.inside("ip", "route", "replace", subnet, "via", self.machines[-1].address))

    def _make(self, machine: Machine) -> None:
        partial = machine.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        (machine.folder / "containerd").mkdir(parents=True, exist_ok=True)
        run(["cp", "-a", base(), partial], timeout_s=120)
        files = {
            "etc/machine-id": f"{uuid.uuid4().hex}\n",
            "etc/hostname": f"{machine.name}\n",
            "etc/hosts": f"127.0.0.1 localhost\n{machine.address} {machine.name}\n",
            # Nobody answers there; a resolver must be named all the same.
            "etc/resolv.conf": f"nameserver {GATEWAY}\n",
            "etc/systemd/system/host0.service": (
                "[Unit]\nDescription=Address of the lab\nDefaultDependencies=no\nBefore=network.target ssh.service\n"
                "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=sh -e /etc/lab.sh\n"
                "[Install]\nWantedBy=multi-user.target\n"
            ),
            "etc/lab.sh": (
                # systemd-nspawn lets the machine's systemd have but its own hierarchy; containers need all.
                "for each in /sys/fs/cgroup/*/; do mount -o remount,bind,rw $each; done\n"
                f"ip address add {machine.address}/{PREFIX} dev host0\nip link set host0 up\n"
                f"ip route add default via {GATEWAY}\n"
            ),
        }
        for name, text in files.items():
            path = partial / name
            path.unlink(missing_ok=True)
            path.write_text(text)
        link = partial / "etc/systemd/system/multi-user.target.wants/host0.service"
        link.symlink_to("/etc/systemd/system/host0.service")
        for host_key in partial.glob("etc/ssh/ssh_host_*"):
            host_key.unlink()
        run(["ssh-keygen", "-A", "-f", partial])
        for user in (INSTALLER, GUEST):
            keys = partial / "home" / user / ".ssh/authorized_keys"
            keys.parent.mkdir(mode=0o700, exist_ok=True)
            keys.write_text(self.key.with_suffix(".pub").read_text())
            run(["chroot", partial, "chown", "-R", f"{user}:{user}", f"/home/{user}/.ssh"])
        with self.known_hosts.open("a") as known:
            known.write(f"{machine.address} {(partial / 'etc/ssh/ssh_host_ed25519_key.pub').read_text()}")
        partial.rename(machine.root)

    def _boot(self, machine: Machine) -> None:
        groups = [path for path in sorted(HIERARCHIES.iterdir()) if path.is_dir()]
        for hierarchy in groups:
            group = hierarchy / machine.group
            group.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (group / name).exists():
                    (group / name).write_text((hierarchy / name).read_text())
        nspawn = [
            # The program of the machine's own system: this one's needs none.
            base() / "lib64/ld-linux-x86-64.so.2",
            "--library-path",
            ":".join(str(base() / "usr/lib/x86_64-linux-gnu" / folder) for folder in ("", "systemd")),
            base() / "usr/bin/systemd-nspawn",
            f"--machine={machine.name}",
            f"--directory={machine.root}",
            *("--boot", "--quiet", "--register=no", "--keep-unit", "--capability=all", "--console=pipe"),
            *("--network-bridge=br0", "--bind-ro=/dev/kmsg", "--resolv-conf=off"),
            *("--timezone=off", "--link-journal=no", f"--bind={machine.folder}/containerd:/var/lib/containerd"),
            *(f"--bind-ro={path}" for path in self.shared),
        ]
        # Every hierarchy, or all machines would have the same groups.
        join = "".join(f"echo $$ > {path / machine.group}/cgroup.procs; " for path in groups)
        with (machine.folder / "console.log").open("ab") as log:
            child = subprocess.Popen(
                self.inside("sh", "-ec", join + 'exec "$@"', "sh", *nspawn),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes",
                    "SYSTEMD_SECCOMP": "0",
                    # Control groups of version 1 and nothing else inside, as kubelet wants them.
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "no",
                },
            )
        (machine.folder / "pid").write_text(str(child.pid))

    def _wait(self, machine: Machine) -> None:
        def answers() -> bool:
            return run(self.ssh(machine, "true"), check=False, timeout_s=20).returncode == 0

        if not _until(answers, BOOT_S):
            log = (machine.folder / "console.log").read_text(errors="replace").splitlines()[-30:]
            raise LabError(f"{machine.name} did not answer by SSH within {BOOT_S} s; its console:\n" + "\n".join(log))

    def _release(self, machine: Machine) -> None:
        """Kill what is left of the machine, and remove its control groups."""

        def empty() -> bool:
            for name in (HIERARCHIES / "pids" / machine.group).rglob("cgroup.procs"):
                for pid in name.read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            for hierarchy in HIERARCHIES.iterdir():
                top = hierarchy / machine.group
                groups = sorted((path for path in [top, *top.rglob("*")] if path.is_dir()), reverse=True)
                for group in groups:
                    try:
                        group.rmdir()
                    except OSError:
                        return False
            return True

        if not _until(empty, STOP_S):
            raise LabError(f"{machine.name} leaves processes in the control group {machine.group} that do not end")

    def inventory(self, variables: Mapping[str, object]) -> dict[str, object]:
        """An inventory of the lab: the first machine is the control plane, the others are workers."""
        first, *others = self.machines
        hosts = {machine.name: {"ansible_host": machine.address} for machine in self.machines}
        return {
            "control_plane": {"hosts": {first.name: hosts[first.name]}},
            "workers": {"hosts": {machine.name: hosts[machine.name] for machine in others}},
            "all": {"vars": {**self.access(), **SETTINGS, **variables}},
        }

    def access(self) -> dict[str, object]:
        """The variables by which Ansible gets in."""
        return {
            "ansible_user": INSTALLER,
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.known_hosts} -o ConnectTimeout=5",
        }

    def write_inventory(self, path: Path, variables: Mapping[str, object]) -> Path:
        path.write_text(json.dumps(self.inventory(variables), indent=1))
        return path


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True
