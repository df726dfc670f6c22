"""The configuration that the playbook renders, and the installed programs that validate it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmtrace.deploy import playbook

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrace-kit"


def installed(pattern: str) -> Path:
    """The newest program at ``pattern`` in the cache, or where it would be."""
    found = (path for path in CACHE.glob(pattern) if ".partial" not in str(path))
    return max(found, key=lambda path: path.stat().st_mtime, default=CACHE / pattern)


def program(pattern: str) -> Path:
    """The installed program at ``pattern`` in the cache; skips the test where `llmtrace up` never ran."""
    found = installed(pattern)
    if not found.exists():
        pytest.skip(f"needs {found}, which `llmtrace up` installs")
    return found


def render(state_home: Path, variables: Mapping[str, object]) -> Path:
    """Render the configuration of the default inventory changed by ``variables``; return its folder."""
    done = _render(state_home, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return state_home / "llmtrace-kit/local/etc"


def refusal(state_home: Path, variables: Mapping[str, object]) -> str:
    """What the playbook says where it refuses ``variables``."""
    done = _render(state_home, variables)
    assert done.returncode != 0, done.stdout
    # Ansible wraps its messages.
    return " ".join((done.stdout + done.stderr).split())


def _render(state_home: Path, variables: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            playbook.playbooks_dir() / "site.yml",
            *(
                "--tags",
                "config,preflight",
                "--skip-tags",
                "doctor,install",
                "--extra-vars",
                json.dumps(variables),
            ),
        ],
        env=os.environ
        | {
            "XDG_STATE_HOME": str(state_home),
            "XDG_CACHE_HOME": str(CACHE.parent),
            "ANSIBLE_CONFIG": str(playbook.CHECKOUT / "ansible.cfg"),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
