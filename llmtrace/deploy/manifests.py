"""Bring kustomize folders into a cluster with kubectl, and say what a pod that does not start waits for."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmtrace.errors import UserError

WORKLOADS = {"Deployment", "StatefulSet", "DaemonSet"}
POLL_S = 2.0
REQUEST_TIMEOUT_S = 60
TRY_AGAIN = "Repair that and run the playbook again, or raise the timeout"
_IN_ORDER = {"PodInitializing", "ContainerCreating"}

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Kubectl:
    """kubectl with a kubeconfig."""

    program: Path
    kubeconfig: Path

    def run(self, arguments: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end, whatever that is; UserError where it is not there or does not end."""
        command = [str(self.program), f"--kubeconfig={self.kubeconfig}", f"--request-timeout={REQUEST_TIMEOUT_S}s"]
        try:
            return subprocess.run(  # noqa: S603
                [*command, *arguments],
                input=text,
                capture_output=True,
                text=True,
                timeout=4 * REQUEST_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            raise UserError(f"{self.program} does not exist: set cluster_kubectl to the path of kubectl") from None
        except subprocess.TimeoutExpired:
            raise UserError(
                f"`kubectl {arguments[0]}` had no answer within {4 * REQUEST_TIMEOUT_S} s: is the API server that "
                f"{self.kubeconfig} names up?"
            ) from None

    def must(self, arguments: Sequence[str], text: str = "") -> str:
        """Run kubectl and return what it prints; UserError with its words where it fails."""
        done = self.run(arguments, text)
        if done.returncode:
            words = " ".join(done.stderr.split())[-600:]
            raise UserError(f"`kubectl {' '.join(arguments[:2])}` failed: {words}")
        return done.stdout

    def objects(self, *arguments: str) -> list[Object]:
        """The objects that `kubectl get` lists."""
        found: list[Object] = json.loads(self.must(["get", *arguments, "--output=json"]))["items"]
        return found


def render(kubectl: Kubectl, folder: Path) -> str:
    """What kustomize makes of ``folder``."""
    return kubectl.must(["kustomize", "--load-restrictor=LoadRestrictionsNone", str(folder)])


def differs(kubectl: Kubectl, text: str) -> bool:
    """Whether the cluster would change; also where that cannot be told, as before the namespaces are there."""
    return kubectl.run(["diff", "--server-side", "--filename=-"], text).returncode != 0


def apply(kubectl: Kubectl, text: str) -> None:
    """Apply, on the server's side."""
    kubectl.must(["apply", "--server-side", "--filename=-"], text)


def workloads(text: str, namespace: str = "default") -> list[tuple[str, str, str]]:
    """Kind, namespace and name of everything in ``text`` that runs pods; ``namespace`` is of what names none."""
    return [
        (found["kind"], found["metadata"].get("namespace", namespace), found["metadata"]["name"])
        for found in yaml.safe_load_all(text)
        if found and found.get("kind") in WORKLOADS
    ]


def progress(workload: Object) -> tuple[int, int]:
    """How many pods of a workload are ready and up to date, and how many shall be."""
    status, spec = workload.get("status", {}), workload["spec"]
    if status.get("observedGeneration", 0) < workload["metadata"]["generation"]:
        return 0, int(spec.get("replicas", 1))
    if workload["kind"] == "DaemonSet":
        counts = status.get("numberAvailable", 0), status.get("updatedNumberScheduled", 0)
        return min(counts), status.get("desiredNumberScheduled", 0)
    ready = min(status.get("readyReplicas", 0), status.get("updatedReplicas", 0))
    return ready, int(spec.get("replicas", 1))


def reason(pod: Object) -> str | None:
    """Why a pod is not ready, in a few words; None where it is."""
    status = pod.get("status", {})
    conditions = {found["type"]: found for found in status.get("conditions", [])}
    if conditions.get("Ready", {}).get("status") == "True":
        return None
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"it has no node: {scheduled.get('message', scheduled.get('reason', ''))}"
    containers: Iterable[Object] = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        state, last = container.get("state", {}), container.get("lastState", {})
        ended = state.get("terminated") or last.get("terminated")
        if waiting := state.get("waiting"):
            if waiting.get("reason") in _IN_ORDER and not ended:
                continue
            words = waiting.get("message") or waiting.get("reason", "")
            last_words = f"; it ended with {ended.get('exitCode')} ({ended.get('reason', '')})" if ended else ""
            return f"container {container['name']}: {words}{last_words}"
        if ended and ended.get("exitCode"):
            return f"container {container['name']} ended with {ended['exitCode']} ({ended.get('reason', '')})"
        if "running" in state and not container.get("ready"):
            return f"container {container['name']} runs and does not say that it is ready"
    return f"it is {status.get('phase', 'unknown')}"


def waiting_for(kubectl: Kubectl, text: str, namespace: str = "default") -> list[str]:
    """A sentence for each workload of ``text`` that is not ready, with the reason of one of its pods."""
    sentences = []
    wanted = workloads(text, namespace)
    found = {
        (each["kind"], each["metadata"]["namespace"], each["metadata"]["name"]): each
        for each in kubectl.objects("deployments,statefulsets,daemonsets", "--all-namespaces")
    }
    for kind, home, name in wanted:
        workload = found.get((kind, home, name))
        ready, all_pods = progress(workload) if workload else (0, 1)
        if workload and ready >= all_pods:
            continue
        why = "it is not there"
        if workload:
            labels = workload["spec"]["selector"].get("matchLabels", {})
            selector = ",".join(f"{key}={value}" for key, value in labels.items())
            pods = kubectl.objects("pods", f"--namespace={home}", f"--selector={selector}")
            reasons = [f"{pod['metadata']['name']}: {words}" for pod in pods if (words := reason(pod))]
            why = reasons[0] if reasons else "its controller has made no pod yet"
        sentences.append(f"{kind} {home}/{name} has {ready} of {all_pods} pods ready ({why})")
    return sentences


def wait(kubectl: Kubectl, text: str, timeout_s: float, namespace: str = "default") -> float:
    """Wait until every workload of ``text`` is ready; return the seconds it took. UserError says what is not."""
    started = time.monotonic()
    while sentences := waiting_for(kubectl, text, namespace):
        if time.monotonic() - started > timeout_s:
            raise UserError(f"after {timeout_s:.0f} s {'; '.join(sentences)}. {TRY_AGAIN}")
        time.sleep(POLL_S)
    return time.monotonic() - started
