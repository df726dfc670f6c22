"""Make the schemas of custom resources from their projects' definitions: ``python -m manifests.checks.vendor``.

Each definition is a file of a Go module, whose version and checksum (as in a go.sum) are pinned here. Needs Go and its
module proxy; what it makes is checked in, without descriptions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmtrace.errors import UserError
from manifests.checks.schemas import FOLDER

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Source:
    """Where definitions are: files of a Go module."""

    module: str
    version: str
    checksum: str
    kinds: tuple[str, ...]
    """Those wanted, of what the files define."""
    files: tuple[str, ...]


SOURCES = (
    Source(
        "sigs.k8s.io/gateway-api",
        "v1.7.0",
        "h1:duVnm7nO6oXfMMUWfcDoBph47CYR/ME3NGxccOVglaY=",
        ("Gateway", "HTTPRoute"),
        (
            "config/crd/standard/gateway.networking.k8s.io_gateways.yaml",
            "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
        ),
    ),
    Source(
        "sigs.k8s.io/gateway-api-inference-extension",
        "v1.5.0",
        "h1:w9Awt60cmI1vM7Y6N81h8wDCBP0WkmxpdI7GKY0v070=",
        ("InferencePool",),
        ("config/crd/bases/inference.networking.k8s.io_inferencepools.yaml",),
    ),
    Source(
        "sigs.k8s.io/lws",
        "v0.7.0",
        "h1:qWfzX8+UBak+Hq0+m/PuE3uO0mp/3dmm5q/h/7z31A8=",
        ("LeaderWorkerSet",),
        ("config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml",),
    ),
    Source(
        "github.com/kedacore/keda/v2",
        "v2.21.0",
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        ("ScaledObject",),
        ("config/crd/bases/keda.sh_scaledobjects.yaml",),
    ),
    Source(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        ("PodMonitor", "Prometheus", "ServiceMonitor"),
        (
            "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_prometheuses.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        ),
    ),
    Source(
        "istio.io/api",
        "v1.28.0",
        "h1:0fYY9G03CAdFwE/fCkpr0v7kKsy+Hz9OCCjLNBNLbnU=",
        ("DestinationRule",),
        ("kubernetes/customresourcedefinitions.gen.yaml",),
    ),
)


def archive(source: Source) -> Path:
    """The module's archive in Go's cache, downloaded where it is not there yet; raises UserError."""
    done = subprocess.run(  # noqa: S603
        [_go(), "mod", "download", "-json", f"{source.module}@{source.version}"],
        env=os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    # That the module wants a newer Go is no error here: nothing of it is compiled.
    found = json.loads(done.stdout or "{}")
    if found.get("Sum") != source.checksum:
        raise UserError(
            f"{source.module}@{source.version} has the checksum {found.get('Sum')} and not {source.checksum}: "
            f"{found.get('Error', done.stderr.strip())}"
        )
    # It says where an archive is only of modules that it would build.
    asked = subprocess.run([_go(), "env", "GOMODCACHE"], capture_output=True, text=True, check=True)  # noqa: S603
    return Path(asked.stdout.strip(), "cache", "download", source.module, "@v", f"{source.version}.zip")


def _go() -> str:
    found = shutil.which("go")
    if found is None:
        raise UserError("go is not on PATH; install it, or take the schemas as they are checked in")
    return found


def closed(schema: Any, *, top: bool = False) -> Any:
    """``schema`` without prose, and with objects that take no field but those that they list."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: {name: closed(part) for name, part in value.items()} if key == "properties" else closed(value)
        for key, value in sorted(schema.items())
        if key not in {"description", "example", "externalDocs"} and not key.startswith("x-kubernetes")
    }
    if top:
        kept["properties"] |= {name: {"type": "string"} for name in ("apiVersion", "kind")} | {
            "metadata": {"type": "object"}
        }
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in kept and kept.get("type") == "object" and not open_ended:
        kept["additionalProperties"] = False
    return kept


def schemas(source: Source) -> dict[str, str]:
    """The files to write, by name."""
    made: dict[str, str] = {}
    with zipfile.ZipFile(archive(source)) as module:
        for file in source.files:
            for definition in yaml.load_all(
                module.read(f"{source.module}@{source.version}/{file}"), Loader=yaml.CSafeLoader
            ):
                if definition is None or definition["spec"]["names"]["kind"] not in source.kinds:
                    continue
                spec = definition["spec"]
                # The version that is stored is the one to write manifests in.
                for version in (version for version in spec["versions"] if version["storage"]):
                    name = f"{spec['group']}_{version['name']}_{spec['names']['kind']}.json"
                    schema = closed(version["schema"]["openAPIV3Schema"], top=True)
                    made[name] = json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n"
    return made


def main() -> int:
    """Write the schemas; returns the exit code."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    try:
        for source in SOURCES:
            for name, text in schemas(source).items():
                (FOLDER / name).write_text(text, encoding="utf-8")
                print(f"{name}: {len(text)} bytes, from {source.module} {source.version}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
