#!/usr/bin/python
"""Ansible module: write or check what a bundle says of itself."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import bundle
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_bundle
short_description: Write or check a bundle's index
description:
  - I(state=written) writes the index of what the folder holds now.
  - I(state=checked) fails with one sentence for each file that is missing or damaged.
options:
  path:
    description: Folder of the bundle.
    type: path
    required: true
  versions:
    description: Version of each component; for I(state=written).
    type: dict
  images:
    description: Path of each image's archive in the bundle; for I(state=written).
    type: dict
  host_packages:
    description: Names of the packages that hosts need; for I(state=written).
    type: list
    elements: str
  needed:
    description: Images that must be in it; for I(state=checked). C(%(NAME)s) is the version of a component.
    type: list
    elements: str
    default: []
  state:
    description: What to do.
    type: str
    choices: [written, checked]
    required: true
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Check the bundle
  llmtrace_bundle:
    path: /srv/bundle
    needed: ["registry.k8s.io/pause:%(pause)s"]
    state: checked
"""
RETURN = r"""
bundle:
  description: The bundle's versions, images (path by name), host_packages and has_packages.
  type: dict
  returned: for I(state=checked)
"""


def write(module, folder):
    """Write the index; return whether it changed."""
    path = folder / bundle.INDEX
    text = bundle.contents(folder, module.params["versions"], module.params["images"], module.params["host_packages"])
    changed = not path.exists() or path.read_text() != text
    if changed and not module.check_mode:
        path.write_text(text)
    return changed


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "versions": {"type": "dict"},
            "images": {"type": "dict"},
            "host_packages": {"type": "list", "elements": "str"},
            "needed": {"type": "list", "elements": "str", "default": []},
            "state": {"type": "str", "choices": ["written", "checked"], "required": True},
        },
        required_if=[("state", "written", ("versions", "images", "host_packages"))],
        supports_check_mode=True,
    )
    folder = Path(module.params["path"])
    try:
        if module.params["state"] == "written":
            module.exit_json(changed=write(module, folder))
        found = bundle.read(folder)
        wrong = bundle.check(folder, found, [name % found.versions for name in module.params["needed"]])
    except (UserError, OSError) as error:
        module.fail_json(msg=str(error))
    if wrong:
        module.fail_json(msg="\n".join(wrong))
    held = {
        "versions": found.versions,
        "images": found.images,
        "host_packages": found.host_packages,
        "has_packages": "packages.tar" in found.files,
    }
    module.exit_json(changed=False, bundle=held)


if __name__ == "__main__":
    main()
