#!/usr/bin/python
"""Ansible module: wait until the stack answers, then write its state file."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from pydantic import ValidationError

from llmtrace.deploy.health import wait_ready
from llmtrace.errors import UserError
from llmtrace.stack import Stack

DOCUMENTATION = r"""
module: llmtrace_stack
short_description: Wait until every component answers and write the state file
description:
  - Waits until every process runs and answers.
  - A component that stopped or is late fails the module with its name and the last lines of its log.
options:
  stack:
    description: Content of the state file, as the model llmtrace.stack.Stack has it.
    type: dict
    required: true
  path:
    description: The state file.
    type: path
    required: true
  timeout_s:
    description: Seconds to wait for a component.
    type: float
    required: true
  timeouts_s:
    description: Seconds to wait for a component, by component name.
    type: dict
    default: {}
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Wait for the stack
  llmtrace_stack:
    stack: "{{ stack }}"
    path: ~/.local/state/llmtrace-kit/local/stack.json
    timeout_s: 60
"""
RETURN = r"""
took_s:
  description: Seconds that each component took to answer.
  type: dict
  returned: always
"""


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "stack": {"type": "dict", "required": True},
            "path": {"type": "path", "required": True},
            "timeout_s": {"type": "float", "required": True},
            "timeouts_s": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, took_s={})
    timeouts = {name: float(value) for name, value in module.params["timeouts_s"].items()}
    try:
        stack = Stack.model_validate(module.params["stack"])
        took = wait_ready(stack, timeouts, module.params["timeout_s"])
        changed = stack.save(Path(module.params["path"]))
    except (UserError, ValidationError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, took_s=took)


if __name__ == "__main__":
    main()
