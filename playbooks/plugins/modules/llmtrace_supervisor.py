#!/usr/bin/python
"""Ansible module: the stack's supervisord and its processes."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy.supervisor import Supervisor
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_supervisor
short_description: Start, update or stop the stack's supervisord
description:
  - I(state=present) starts supervisord where it does not run, then starts, restarts and stops exactly the
    processes whose configuration changed, and starts those that had stopped.
  - I(state=absent) stops all processes and supervisord.
options:
  socket:
    description: Unix socket of supervisord.
    type: path
    required: true
  conf:
    description: Configuration file of supervisord; needed for I(state=present).
    type: path
  state:
    description: Whether supervisord shall run.
    type: str
    choices: [present, absent]
    default: present
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Start what changed
  llmtrace_supervisor:
    socket: /run/user/1000/stack/supervisor.sock
    conf: /run/user/1000/stack/supervisord.conf
"""
RETURN = r"""
actions:
  description: What was started, restarted or stopped.
  type: str
  returned: always
"""


def present(supervisor, conf, check_mode):
    """Return (changed, actions)."""
    if supervisor.pid() is None:
        if not check_mode:
            supervisor.launch(conf)
        return True, "started supervisord and every process"
    update = supervisor.pending() if check_mode else supervisor.update()
    stopped = supervisor.down()
    if stopped and not check_mode:
        supervisor.revive()
    actions = str(update) + (f"; started again {', '.join(stopped)}" if stopped else "")
    return bool(update or stopped), actions


def absent(supervisor, check_mode):
    """Return (changed, actions)."""
    running = supervisor.pid() is not None
    if running and not check_mode:
        supervisor.shutdown()
    return running, "stopped every process and supervisord" if running else "supervisord was not running"


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "required": True},
            "conf": {"type": "path"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ["conf"])],
        supports_check_mode=True,
    )
    supervisor = Supervisor(Path(module.params["socket"]))
    try:
        if module.params["state"] == "present":
            changed, actions = present(supervisor, Path(module.params["conf"]), module.check_mode)
        else:
            changed, actions = absent(supervisor, module.check_mode)
    except UserError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, actions=actions)


if __name__ == "__main__":
    main()
