"""What every pod has to have, and the Pod Security Standard that it needs.

https://kubernetes.io/docs/concepts/security/pod-security-standards/, as of Kubernetes 1.34, for the fields that the
manifests use; other fields of these standards are not allowed at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from manifests.checks.render import Object, containers, name_of, workloads

LEVELS = ("restricted", "baseline", "privileged")
BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"),
    "secret",
}
ENFORCE = "pod-security.kubernetes.io/enforce"
CREATABLE = {"configmaps", "leases", "subjectaccessreviews", "tokenreviews"}
"""What a role may let be made: by its name it cannot be limited."""
FORBIDDEN_POD_FIELDS = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "ephemeralContainers")
FORBIDDEN_CONTAINER_FIELDS = (
    "privileged",
    "procMount",
    "seLinuxOptions",
    "windowsOptions",
    "appArmorProfile",
    "seccompProfile",
)
EXACT_IMAGE = re.compile(r"[a-z0-9.-]+\.[a-z]+/[a-z0-9._/-]+(:v?\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})")
"""A registry, a path, and an exact version or a digest."""


def level(template: Object) -> str:
    """The strictest Pod Security Standard that admits the pod."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    needed = 0
    for volume in spec.get("volumes", ()):
        (kind,) = volume.keys() - {"name"}
        needed = max(needed, 0 if kind in RESTRICTED_VOLUMES else 2)
    if pod.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        needed = max(needed, 1)
    for container, _ in containers(template):
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        added = set(capabilities.get("add", ()))
        if added - BASELINE_CAPABILITIES or any(port.get("hostPort") for port in container.get("ports", ())):
            needed = 2
        restricted = (
            own.get("allowPrivilegeEscalation") is False
            and "ALL" in capabilities.get("drop", ())
            and added <= {"NET_BIND_SERVICE"}
            and own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True
            and own.get("runAsUser", pod.get("runAsUser")) != 0
        )
        needed = max(needed, 0 if restricted else 1)
    return LEVELS[needed]


def violations(items: Sequence[Object]) -> Iterator[str]:
    """One sentence for each policy that a workload breaks."""
    enforced = {
        item["metadata"]["name"]: item["metadata"]["labels"][ENFORCE] for item in items if item["kind"] == "Namespace"
    }
    for item, template in workloads(items):
        name = name_of(item)
        namespace = item["metadata"]["namespace"]
        needed = level(template)
        admitted = enforced.get(namespace, "restricted")
        if LEVELS.index(needed) > LEVELS.index(admitted):
            yield f"{name} needs Pod Security {needed}, and its namespace enforces {admitted}"
        yield from (f"{name}: {sentence}" for sentence in _pod(template))
        for container, stays in containers(template):
            yield from (
                f"{name}, container {container['name']}: {sentence}" for sentence in _container(container, stays)
            )
    for item in items:
        if item["kind"] in {"Role", "ClusterRole"}:
            yield from (f"{name_of(item)}: {sentence}" for sentence in _rules(item))


def _pod(template: Object) -> Iterator[str]:
    spec = template["spec"]
    for field in FORBIDDEN_POD_FIELDS:
        if field in spec:
            yield f"{field} is not allowed"
    if spec.get("serviceAccountName", "default") == "default":
        yield "it has no service account of its own"
    if "automountServiceAccountToken" not in spec:
        yield "it does not say whether it gets its account's token"


def _container(container: Object, stays: bool) -> Iterator[str]:
    own = container.get("securityContext", {})
    for field in FORBIDDEN_CONTAINER_FIELDS:
        if field in own:
            yield f"{field} is not allowed"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "privileges may escalate"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "its root file system is writable"
    if "ALL" not in own.get("capabilities", {}).get("drop", ()):
        yield "it keeps capabilities"
    resources = container.get("resources", {})
    for field in ("requests.cpu", "requests.memory", "limits.memory"):
        kind, what = field.split(".")
        if what not in resources.get(kind, {}):
            yield f"it has no {field}"
    if not EXACT_IMAGE.fullmatch(container["image"]):
        yield f"its image {container['image']} has neither an exact version nor a digest"
    if stays:
        for probe in ("livenessProbe", "readinessProbe"):
            if probe not in container:
                yield f"it has no {probe}"


def _rules(role: Object) -> Iterator[str]:
    for rule in role["rules"]:
        words = [
            word for field in ("apiGroups", "resources", "verbs", "nonResourceURLs") for word in rule.get(field, ())
        ]
        if "*" in words:
            yield "it allows everything of a kind (*)"
        if "secrets" in words:
            yield "it allows secrets to be read"
        if set(rule["verbs"]) - {"get", "list", "watch", "create"} and "resourceNames" not in rule:
            yield f"it allows more than to look, and not at named objects only: {', '.join(rule['verbs'])}"
        if "create" in rule["verbs"] and not set(rule["resources"]) <= CREATABLE:
            yield f"it allows to create {', '.join(rule['resources'])}"
