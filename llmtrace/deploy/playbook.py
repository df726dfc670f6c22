"""Run the kit's playbooks, and read the default inventory's variables."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from llmtrace.errors import UserError
from llmtrace.stack import cache_home

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
    lock = _lock()
    # Ansible finds ansible-playbook's siblings on PATH, and its configuration in the checkout.
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"),
        "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with lock:
        return subprocess.run([program, path, *arguments], env=environment, check=False).returncode  # noqa: S603


def _lock() -> IO[bytes]:
    """Hold the cache for this process: two installs at once would remove each other's half-finished folders."""
    path = cache_home() / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another `llmtrace up` or `llmtrace down` is at work (it holds {path}): wait until it has ended"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make it writable") from None
    return file
