"""The objects that kustomize makes of a folder, by the kubectl beside this Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrace.errors import UserError

MANIFESTS = Path(__file__).parents[1]
Object = dict[str, Any]
"""One Kubernetes object."""
COMPONENTS = sorted(path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml"))
OVERLAYS = [
    "observability",
    *sorted(str(path.parent.relative_to(MANIFESTS)) for path in MANIFESTS.glob("scenarios/*/kustomization.yaml")),
]
"""What people apply, as folders of manifests/."""
TIMEOUT_S = 60.0


def render(overlay: str, components: Sequence[str] = ()) -> list[Object]:
    """The objects of ``overlay`` with ``components`` on top, as an overlay of one's own would have them.

    Raises UserError with kustomize's words where it does not build.
    """
    if not components:
        return build(MANIFESTS / overlay)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(MANIFESTS / overlay, here)],
            "components": [os.path.relpath(MANIFESTS / "components" / name, here) for name in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return build(here)


def build(folder: Path) -> list[Object]:
    """The objects of the kustomization in ``folder``; raises UserError."""
    done = subprocess.run(  # noqa: S603
        [Path(sys.executable).with_name("kubectl"), "kustomize", folder],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"{folder} does not build: {done.stderr.strip()}")
    return [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found is not None]


def name_of(item: Object) -> str:
    """What a person calls the object: kind, namespace and name."""
    metadata = item["metadata"]
    return "/".join(part for part in (item["kind"], metadata.get("namespace"), metadata["name"]) if part)


def template_of(item: Object) -> Object | None:
    """The pod template of a workload, with its labels; None for what makes no pods."""
    spec = item.get("spec", {})
    if item["kind"] in {"Deployment", "DaemonSet", "StatefulSet"}:
        return dict(spec["template"])
    if item["kind"] == "LeaderWorkerSet":
        return dict(spec["leaderWorkerTemplate"]["workerTemplate"])
    return None


def workloads(items: Sequence[Object]) -> Iterator[tuple[Object, Object]]:
    """The workloads with their pod templates."""
    for item in items:
        template = template_of(item)
        if template is not None:
            yield item, template


def containers(template: Object) -> Iterator[tuple[Object, bool]]:
    """The containers of a pod, and whether each runs as long as the pod does."""
    for container in template["spec"].get("initContainers", ()):
        yield container, container.get("restartPolicy") == "Always"
    for container in template["spec"]["containers"]:
        yield container, True
