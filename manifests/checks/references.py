"""What objects say of each other: names, selectors, ports, files. Kubernetes takes them unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from manifests.checks.pods import chart_accounts, matches, pods
from manifests.checks.render import Object, containers, name_of, workloads

CONFIG_FILE = re.compile(r"(?:=|^)(/etc/[a-z]+/[a-z0-9/.-]+|/config/[a-z.-]+|/source/[a-z_.]+)$")
"""Files in an argument that must come from a ConfigMap."""
URL = re.compile(r"^(?:http://)?([a-z-]+)\.(llmtrace|llm-d):(\d+)$")
"""Addresses of Services in values of the environment and in arguments."""


def violations(items: Sequence[Object]) -> Iterator[str]:
    """One sentence for each reference that leads nowhere."""
    known = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]): item for item in items}
    known |= {("ServiceAccount", namespace, account): {} for namespace, account in chart_accounts(items)}
    everybody = pods(items)
    for item, template in workloads(items):
        yield from (f"{name_of(item)}: {sentence}" for sentence in _pod(item["metadata"]["namespace"], template, known))
        if item["kind"] != "DaemonSet" and not any(
            budget["metadata"]["namespace"] == item["metadata"]["namespace"]
            and matches(budget["spec"]["selector"], template["metadata"]["labels"])
            for budget in items
            if budget["kind"] == "PodDisruptionBudget"
        ):
            yield f"{name_of(item)} has no PodDisruptionBudget"
    for item in items:
        namespace = item["metadata"].get("namespace")
        if namespace is not None and ("Namespace", None, namespace) not in known:
            yield f"{name_of(item)}: there is no namespace {namespace}"
        if item["kind"] == "RoleBinding" and ("Role", namespace, item["roleRef"]["name"]) not in known:
            yield f"{name_of(item)} binds a role that is not there"
        if item["kind"] in {"RoleBinding", "ClusterRoleBinding"}:
            for subject in item["subjects"]:
                if ("ServiceAccount", subject["namespace"], subject["name"]) not in known:
                    yield f"{name_of(item)} binds an account that is not there: {subject['name']}"
        selector = _selector(item)
        if selector is not None and not any(
            matches(selector, dict(pod.labels)) and pod.namespace == namespace for pod in everybody
        ):
            yield f"{name_of(item)} selects no pods"


def _selector(item: Object) -> Object | None:
    if item["kind"] == "Service":
        return {"matchLabels": item["spec"]["selector"]}
    if item["kind"] in {"PodDisruptionBudget", "InferencePool"}:
        return dict(item["spec"]["selector"])
    return None


def _pod(namespace: str, template: Object, known: Mapping[tuple[str, str | None, str], Object]) -> Iterator[str]:
    spec = template["spec"]
    if ("ServiceAccount", namespace, spec["serviceAccountName"]) not in known:
        yield f"there is no account {spec['serviceAccountName']}"
    files: dict[str, set[str]] = {}
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    for volume in volumes.values():
        if "configMap" in volume:
            found = known.get(("ConfigMap", namespace, volume["configMap"]["name"]))
            if found is None:
                yield f"there is no ConfigMap {volume['configMap']['name']}"
            files[volume["name"]] = set(found["data"]) if found else set()
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            if ("PersistentVolumeClaim", namespace, claim) not in known:
                yield f"there is no PersistentVolumeClaim {claim}"
    for container, _ in containers(template):
        yield from (f"container {container['name']}: {sentence}" for sentence in _container(container, files, known))


def _container(
    container: Object, files: Mapping[str, set[str]], known: Mapping[tuple[str, str | None, str], Object]
) -> Iterator[str]:
    mounted = {
        f"{mount['mountPath']}/{file}"
        for mount in container.get("volumeMounts", ())
        for file in files.get(mount["name"], ())
    }
    arguments = [*container.get("command", ()), *container.get("args", ())]
    for argument in arguments:
        wanted = CONFIG_FILE.search(argument)
        if wanted and wanted[1] not in mounted:
            yield f"there is no file {wanted[1]} in the ConfigMaps that it mounts"
    ports = {port["name"] for port in container.get("ports", ())}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        for how in ("httpGet", "tcpSocket"):
            port = container.get(probe, {}).get(how, {}).get("port")
            if port is not None and port not in ports:
                yield f"its {probe} asks a port {port} that it does not have"
    for value in (*(variable.get("value", "") for variable in container.get("env", ())), *arguments):
        address = URL.match(value.partition("=")[2] if value.startswith("--") else value)
        if address is None:
            continue
        service = known.get(("Service", address[2], address[1]))
        # Of a namespace that is not part of what is rendered nothing can be said.
        if service is None and ("Namespace", None, address[2]) in known:
            yield f"there is no Service {address[1]} in {address[2]}"
        elif service is not None and int(address[3]) not in {port["port"] for port in service["spec"]["ports"]}:
            yield f"the Service {address[1]} has no port {address[3]}"
