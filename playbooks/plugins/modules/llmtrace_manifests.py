#!/usr/bin/python
"""Ansible module: kustomize folders in a cluster."""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import manifests
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_manifests
short_description: Apply a kustomize folder and wait until its pods are ready
description:
  - Applies on the server's side, and only where C(kubectl diff) says that something would change.
  - Waits until every Deployment, StatefulSet and DaemonSet of the folder is ready.
  - What is not ready in time is named, with its pod's reason.
options:
  kubectl:
    description: kubectl.
    type: path
    required: true
  kubeconfig:
    description: The cluster's kubeconfig.
    type: path
    required: true
  path:
    description: The folder.
    type: path
    required: true
  timeout_s:
    description: Seconds to wait; 0 does not wait.
    type: int
    default: 600
author: [llmtrace]
attributes:
  check_mode:
    support: full
"""
EXAMPLES = r"""
- name: Bring a scenario into the cluster
  llmtrace_manifests:
    kubectl: /usr/local/bin/kubectl
    kubeconfig: ~/.kube/config
    path: manifests/scenarios/prefix-cache
"""
RETURN = r"""
took_s:
  description: Seconds until all was ready.
  type: dict
  returned: where it waited
"""


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "kubectl": {"type": "path", "required": True},
            "kubeconfig": {"type": "path", "required": True},
            "path": {"type": "path", "required": True},
            "timeout_s": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    kubectl = manifests.Kubectl(Path(wanted["kubectl"]), Path(wanted["kubeconfig"]))
    took = None
    try:
        text = manifests.render(kubectl, Path(wanted["path"]))
        changed = manifests.differs(kubectl, text)
        if changed and not module.check_mode:
            manifests.apply(kubectl, text)
        if wanted["timeout_s"] and not module.check_mode:
            took = manifests.wait(kubectl, text, wanted["timeout_s"])
    except UserError as error:
        module.fail_json(msg=f"{wanted['path']}: {error}.")
    module.exit_json(changed=changed, **({} if took is None else {"took_s": {"ready after": took}}))


if __name__ == "__main__":
    main()
