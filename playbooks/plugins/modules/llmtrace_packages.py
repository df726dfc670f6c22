#!/usr/bin/python
"""Ansible module: Debian packages with their dependencies, as a repository in a folder."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import packages
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_packages
short_description: Fetch Debian packages with everything that they need
description:
  - Fetches nothing where the folder has an index with every wanted package; remove the folder for newer versions.
options:
  folder:
    description: Folder of the packages.
    type: path
    required: true
  packages:
    description: Names of the packages.
    type: list
    elements: str
    required: true
  mirror:
    description: The mirror.
    type: str
    required: true
  suite:
    description: Code name of the release.
    type: str
    required: true
  archive:
    description: A tar file that the folder is packed into; empty for none.
    type: path
    default: ""
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Fetch the container runtime
  llmtrace_packages:
    folder: /srv/bundle/packages
    packages: [containerd]
    mirror: http://deb.debian.org/debian
    suite: bookworm
"""


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
            "mirror": {"type": "str", "required": True},
            "suite": {"type": "str", "required": True},
            "archive": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    folder = Path(wanted["folder"])
    archive = Path(wanted["archive"]) if wanted["archive"] else None
    changed = not set(wanted["packages"]) <= packages.indexed(folder)
    try:
        if changed and not module.check_mode:
            packages.fetch(folder, wanted["packages"], wanted["mirror"], wanted["suite"])
        if archive and (changed or not archive.exists()):
            changed = True
            if not module.check_mode:
                packages.pack(folder, archive)
    except (UserError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed)


if __name__ == "__main__":
    main()
