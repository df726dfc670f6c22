"""Run the kit's playbooks, and read the default inventory's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrace.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def playbooks_dir() -> Path:
    """Folder of the playbooks; UserError where the package is not installed from a checkout."""
    folder = CHECKOUT / "playbooks"
    if not (folder / "site.yml").is_file():
        raise UserError(
            "The playbooks are not part of the installed package: clone the repository, run `make up` in it, "
            "or install it there with `pip install --editable .[kit,deploy]`"
        )
    return folder


def default_variables() -> dict[str, Any]:
    """Variables of the default inventory as they are written, templates unrendered."""
    path = playbooks_dir() / "inventories/local/group_vars/all.yml"
    variables = yaml.safe_load(path.read_text())
    if not isinstance(variables, dict):
        raise UserError(f"{path} holds no mapping of variables: restore it from the repository")
    return variables


def run(playbook: str, arguments: Sequence[str] = ()) -> int:
    """Run a playbook with ansible-playbook of this environment; return its exit code."""
    path = playbooks_dir() / playbook
    program = Path(sys.executable).parent / "ansible-playbook"
    if not program.is_file():
        raise UserError(f"{program} does not exist: install the extra `deploy` (`make up` does)")
    # Ansible finds ansible-playbook's siblings on PATH, and its configuration in the checkout.
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"),
        "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return subprocess.run([program, path, *arguments], env=environment, check=False).returncode  # noqa: S603
