#!/usr/bin/python
"""Ansible module: the checks of ``llmtrace doctor``."""

from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import doctor, source
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_doctor
short_description: Check that the local stack can run on this machine
description:
  - Runs the checks of C(llmtrace doctor) and fails with one sentence for each check that fails.
  - Half-finished installs are reported as warnings, because the roles repeat them.
options:
  variables:
    description: The inventory's port variables, scenario, vllm_servers and prefill_servers.
    type: dict
    required: true
  cache_dir:
    description: Folder of downloads and builds.
    type: path
    required: true
  state_dir:
    description: Folder of the stack's state.
    type: path
    required: true
  run_dir:
    description: Folder of the supervisor's socket.
    type: path
    required: true
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Check the machine
  llmtrace_doctor:
    variables: "{{ doctor_variables }}"
    cache_dir: ~/.cache/llmtrace-kit
    state_dir: ~/.local/state/llmtrace-kit/local
    run_dir: ~/.local/state/llmtrace-kit/local/run
"""
RETURN = r"""
checks:
  description: Every check with name, ok and message.
  type: list
  returned: always
source_digests:
  description: Digests of the code that the kit's own processes (services) and the model servers' plugin (engine) run.
  type: dict
  returned: success
"""


def main():
    """Run the module."""
    folder = {"type": "path", "required": True}
    module = AnsibleModule(
        argument_spec={
            "variables": {"type": "dict", "required": True},
            "cache_dir": folder,
            "state_dir": folder,
            "run_dir": folder,
        },
        supports_check_mode=True,
    )
    folders = [Path(module.params[name]) for name in ("cache_dir", "state_dir", "run_dir")]
    try:
        requirements = doctor.requirements_of(module.params["variables"], *folders)
    except (KeyError, UserError) as error:
        module.fail_json(msg=str(error))
    checks = doctor.check(doctor.gather(requirements), requirements)
    failed = [check for check in checks if not check.ok and check.name != "installs"]
    for check in checks:
        if not check.ok and check.name == "installs":
            module.warn(check.message)
    outcome = [asdict(check) for check in checks]
    if failed:
        module.fail_json(msg="\n".join(check.message for check in failed), checks=outcome)
    module.exit_json(changed=False, checks=outcome, source_digests=source.digests())


if __name__ == "__main__":
    main()
