#!/usr/bin/python
"""Ansible module: a container image of one layer, without a container engine."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import oci
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_image
short_description: Write a container image as an archive that containerd imports
description:
  - The image has one layer, with a static program in C(/usr/local/bin) and the files of Debian packages.
  - An archive that was made of the same content is kept.
options:
  name:
    description: The image's whole name, with its tag.
    type: str
    required: true
  folder:
    description: Folder of the archive.
    type: path
    required: true
  program:
    description: The program.
    type: path
  entrypoint:
    description: Whether the program starts where a pod names no command.
    type: bool
    default: false
  packages:
    description: Packages by their path without C(.deb).
    type: list
    elements: path
    default: []
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Write the image of etcd
  llmtrace_image:
    name: registry.k8s.io/etcd:3.6.5-0
    folder: /srv/bundle/images
    program: /srv/build/etcd
"""
RETURN = r"""
path:
  description: The archive.
  type: str
  returned: always
"""


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "folder": {"type": "path", "required": True},
            "program": {"type": "path"},
            "entrypoint": {"type": "bool", "default": False},
            "packages": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    archive = Path(wanted["folder"]) / oci.file_name(wanted["name"])
    program = Path(wanted["program"]) if wanted["program"] else None
    packages = [Path(f"{path}.deb") for path in wanted["packages"]]
    try:
        there = all(path.is_file() for path in [*([program] if program else []), *packages])
        right = there and oci.content_of(archive) == oci.content_digest(program, packages, wanted["entrypoint"])
        if not right and not module.check_mode:
            oci.write(archive, wanted["name"], program, packages, entrypoint=wanted["entrypoint"])
    except (UserError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=not right, path=str(archive))


if __name__ == "__main__":
    main()
