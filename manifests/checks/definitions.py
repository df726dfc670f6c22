"""Schemas of custom resources, made from their projects' definitions.

Each definition is a file of a Go module, whose version and checksum (as in a go.sum) are pinned here. The schemas are
made once, into the kit's cache. That needs Go's module proxy and the Go beside this Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmtrace.errors import UserError
from llmtrace.stack import cache_home

TIMEOUT_S = 300.0
GO = Path(sys.executable).with_name("go")


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
        ("DestinationRule", "EnvoyFilter", "Telemetry"),
        ("kubernetes/customresourcedefinitions.gen.yaml",),
    ),
)


def archive(source: Source) -> Path:
    """The module's archive in Go's cache, downloaded where it is not there yet; raises UserError."""
    done = subprocess.run(  # noqa: S603
        [GO, "mod", "download", "-json", f"{source.module}@{source.version}"],
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
    asked = subprocess.run([GO, "env", "GOMODCACHE"], capture_output=True, text=True, check=True)  # noqa: S603
    return Path(asked.stdout.strip(), "cache", "download", source.module, "@v", f"{source.version}.zip")


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


def custom_resources(source: Source) -> Iterator[dict[str, Any]]:
    """The definitions that are wanted, as their project has them; raises UserError."""
    with zipfile.ZipFile(archive(source)) as module:
        for file in source.files:
            text = module.read(f"{source.module}@{source.version}/{file}")
            for definition in yaml.load_all(text, Loader=yaml.CSafeLoader):
                if definition is not None and definition["spec"]["names"]["kind"] in source.kinds:
                    yield definition


def schemas(source: Source) -> dict[str, str]:
    """The files to write, by name."""
    made: dict[str, str] = {}
    for definition in custom_resources(source):
        spec = definition["spec"]
        # The version that is stored is the one to write manifests in.
        for version in (version for version in spec["versions"] if version["storage"]):
            name = f"{spec['group']}_{version['name']}_{spec['names']['kind']}.json"
            schema = closed(version["schema"]["openAPIV3Schema"], top=True)
            made[name] = json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n"
    return made


@cache
def folder() -> Path:
    """The folder of the schemas, made where it is not there yet; raises UserError."""
    # What it holds follows from this file alone.
    wanted = cache_home() / "custom-resources" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    if not wanted.is_dir():
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wanted.parent, suffix=".partial") as making:
            made = Path(making, "made")
            made.mkdir()
            for source in SOURCES:
                for name, text in schemas(source).items():
                    made.joinpath(name).write_text(text, encoding="utf-8")
            # Another process may have been faster.
            if not wanted.is_dir():
                made.rename(wanted)
    return wanted
