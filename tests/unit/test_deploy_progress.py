"""The callback plugin's output, by running ansible-playbook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llmtrace.deploy import playbook

PLAY = """
- name: A play without hosts
  hosts: nobody
  tasks:
    - {name: Never, ansible.builtin.command: "false"}

- name: Some play
  hosts: localhost
  gather_facts: false
  tasks:
    - {name: A long task, ansible.builtin.command: sleep 1.5, vars: {expected_seconds: 20}}
    - {name: A longer one, ansible.builtin.command: sleep 1.5, changed_when: false, vars: {expected_seconds: }}
    - {name: A skipped task, ansible.builtin.command: sleep 1, vars: {expected_seconds: 20}, when: false}
    - {name: A quick task, ansible.builtin.command: "true", changed_when: false}
    - name: Looping
      ansible.builtin.fail: {msg: "Item {{ item }} is broken: repair it."}
      loop: [one]
"""


def test_progress_is_one_plain_line_a_task_and_failures_are_their_sentence(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAY)
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", tmp_path / "play.yml"],
        env=os.environ | {"ANSIBLE_CONFIG": str(playbook.CHECKOUT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    lines = [line.partition("] ")[2] for line in done.stdout.splitlines()]
    assert lines[0] == "Some play"
    assert "start    A long task (about 20 s)" in lines
    assert "start    A longer one (minutes)" in lines
    assert any(line.startswith("changed  A long task (") for line in lines)
    assert "ok       A quick task" in lines
    assert not any("skipped" in line for line in lines)
    assert "FAILED   Looping" in lines
    assert lines[-1] == "localhost: ok=3, changed=1, failures=1, unreachable=0"
    assert done.stderr.strip().splitlines() == ["Item one is broken: repair it."]
    assert "\x1b[" not in done.stdout
