#!/usr/bin/python
"""Ansible module: a Helm chart in a cluster."""

import asyncio
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from llmtrace.deploy import charts
from llmtrace.deploy.manifests import Kubectl
from llmtrace.errors import UserError

DOCUMENTATION = r"""
module: llmtrace_chart
short_description: Bring a release to a chart's version, with values, and wait until its pods are ready
description:
  - Installs or upgrades where chart, version or values are others than those of the release's current revision, or
    where that one failed. The files of a chart that has the same version are not compared.
  - What does not get ready in time is named, with its pod's reason, and the release goes back to the last revision that
    worked; a first one is removed.
  - A release that an interrupted helm left pending is brought back before, or removed where it was the first.
  - With C(--diff), shows the chart's objects before and after. What Secrets hold is not shown.
options:
  helm:
    description: helm.
    type: path
    required: true
  kubectl:
    description: kubectl, which tells why a pod is not ready.
    type: path
    required: true
  kubeconfig:
    description: The cluster's kubeconfig.
    type: path
    required: true
  name:
    description: The release.
    type: str
    required: true
  namespace:
    description: Its namespace, which is made where it is not there.
    type: str
    required: true
  chart:
    description: Path of a packaged chart or of its folder, an address (oci://, https://), or a name in I(repository).
    type: str
    required: true
  repository:
    description: Address of a repository of charts.
    type: str
  version:
    description: The chart's version; the newest without it.
    type: str
  values:
    description: What differs from the chart's own values.
    type: dict
    default: {}
  timeout_s:
    description: Seconds to wait; 0 does not wait.
    type: int
    default: 600
author: [llmtrace]
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""
EXAMPLES = r"""
- name: Bring KEDA into the cluster
  llmtrace_chart:
    helm: ~/.cache/llmtrace-kit/helm/3.22.0/helm
    kubectl: /usr/local/bin/kubectl
    kubeconfig: ~/.kube/config
    name: keda
    namespace: keda
    chart: keda
    repository: https://kedacore.github.io/charts
    version: 2.21.1
"""
RETURN = r"""
diff:
  description: The chart's objects before and after, as YAML.
  type: dict
  returned: always
"""


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "helm": {"type": "path", "required": True},
            "kubectl": {"type": "path", "required": True},
            "kubeconfig": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "namespace": {"type": "str", "required": True},
            "chart": {"type": "str", "required": True},
            "repository": {"type": "str"},
            "version": {"type": "str"},
            "values": {"type": "dict", "default": {}},
            "timeout_s": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    given = module.params
    kubeconfig = Path(given["kubeconfig"])
    wanted = charts.Wanted(
        **{key: given[key] for key in ("name", "namespace", "chart", "repository", "version", "values")}
    )
    try:
        helm = charts.client(given["helm"], kubeconfig)
        releases = charts.Charts(helm, Kubectl(Path(given["kubectl"]), kubeconfig), given["timeout_s"])
        found = asyncio.run(releases.ensure(wanted, check=module.check_mode))
    except UserError as error:
        module.fail_json(msg=f"{wanted.name}: {error}.")
    module.exit_json(changed=found.changed, diff={"before": found.before, "after": found.after})


if __name__ == "__main__":
    main()
