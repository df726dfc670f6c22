"""A cluster on the lab's machines: its playbooks and its API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machines import Lab, Machine

from llmtrace.deploy.playbook import CHECKOUT

NEXT_VERSION = "1.34.4"
"""Of Kubernetes: what the cluster is upgraded to from that of playbooks/vars/versions.yml."""


@dataclass(frozen=True)
class Played:
    """A run of ansible-playbook: its exit code, what it printed, and how many changes it counted by host.

    ``began`` is Unix time.
    """

    code: int
    text: str
    changes: Mapping[str, int]
    began: float
    seconds: float

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@dataclass(frozen=True)
class Cluster:
    """The lab, the bundle, and the kubeconfig that the playbook writes."""

    lab: Lab
    bundle: Path
    kubeconfig: Path

    def play(self, playbook: str, *arguments: str, inventory: Path | None = None, **variables: object) -> Played:
        """Run a playbook in the lab's network."""
        inventory = inventory or self.lab.write_inventory(self.lab.folder / "inventory.json", self.variables())
        began, started = time.time(), time.monotonic()
        command = self.lab.inside(
            Path(sys.executable).parent / "ansible-playbook",
            f"--inventory={inventory}",
            CHECKOUT / "playbooks" / playbook,
            *(("--extra-vars", json.dumps(variables)) if variables else ()),
            *arguments,
        )
        # A run logs in anew: it takes no connection that an earlier one left.
        with tempfile.TemporaryDirectory(prefix="llmtrace-ssh-") as connections:
            done = subprocess.run(
                command,
                env={
                    **os.environ,
                    "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"),
                    "ANSIBLE_SSH_CONTROL_PATH_DIR": connections,
                },
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        text = done.stdout + done.stderr
        changes = {host: int(count) for host, count in re.findall(r"\] (\S+): ok=\d+, changed=(\d+)", text)}
        return Played(done.returncode, text, changes, began, time.monotonic() - started)

    def variables(self) -> dict[str, object]:
        return {"bundle": str(self.bundle), "cluster_kubeconfig": str(self.kubeconfig)}

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run the bundle's kubectl in the lab's network; return what it prints."""
        done = subprocess.run(
            self.lab.inside(self.bundle / "programs/kubectl", f"--kubeconfig={self.kubeconfig}", *arguments),
            input=text,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "--output=json"))["items"]
        return found

    def address(self, service: str, namespace: str) -> str:
        """Address of a service, which is routed by a worker."""
        return self.kubectl(
            "get", "service", service, f"--namespace={namespace}", "--output=jsonpath={.spec.clusterIP}"
        )

    def ready(self) -> dict[str, bool]:
        """Whether each node is ready."""
        return {
            node["metadata"]["name"]: any(
                each["type"] == "Ready" and each["status"] == "True" for each in node["status"]["conditions"]
            )
            for node in self.get("nodes")
        }

    def machine(self, name: str) -> Machine:
        return self.lab.machine(name)
