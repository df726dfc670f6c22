"""What site.yml and verify.yml say of an inventory that is not right, without a host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port

from llmtrace.deploy import playbook
from llmtrace.stack import Stack

HOSTS = {"hosts": {"node-1": {"ansible_host": "192.0.2.1"}}}


def refusal(tmp_path: Path, inventory: dict[str, Any], name: str = "site.yml") -> str:
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps(inventory))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", path, playbook.playbooks_dir() / name],
        env=os.environ | {"ANSIBLE_CONFIG": str(playbook.CHECKOUT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("inventory", "words"),
    [
        ({"control_plane": HOSTS, "wrokers": {"hosts": {"node-2": {}}}}, "(hosts in none of them: node-2)"),
        ({"workers": HOSTS}, "workers only with a control_plane: correct the groups' names"),
        ({"control_plane": HOSTS}, "there is no bundle in /nowhere: make one with"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path: Path, inventory: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {**inventory, "all": {"vars": {"bundle": "/nowhere"}}})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"cluster_charts": ["keda", "kda"]},
            "cluster_charts has kda, and playbooks/vars/versions.yml knows gateway-api,",
        ),
        ({"cluster_charts": ["keda"], "cluster_helm": "/nowhere/helm"}, "There is no /nowhere/helm: build helm with"),
    ],
)
def test_charts_that_cannot_be_installed_are_refused(tmp_path: Path, variables: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, {"kubernetes": {"hosts": {"prod": {}}}, "all": {"vars": variables}})


def test_smoke_tests_of_a_cluster_say_what_does_not_answer(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    stack = {
        "scenario": "prefix-cache",
        "model": "Qwen3-32B",
        "gateways": {"prefix-aware": address},
        "collector_otlp_grpc": address,
        "store": address,
    }
    variables = {"cluster_verify": [stack], "cluster_verify_timeout_s": 1}
    inventory = {"kubernetes": {"hosts": {"prod": {}}}, "all": {"vars": variables}}
    assert f"the trace store at {address} cannot be reached" in refusal(tmp_path, inventory, "verify.yml")
    assert Stack.load(tmp_path / "stack-prefix-cache.json").gateways == {"prefix-aware": address}
