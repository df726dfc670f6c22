"""Objects against Kubernetes' schemas, and custom resources against those of their own definitions.

Unknown fields are errors, as for the API server with strict field validation. Rules in CEL (x-kubernetes-validations)
are not evaluated.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from manifests.checks.render import Object

KUBERNETES = "1.34"
FOLDER = Path(__file__).with_name("crds")
"""Schemas of custom resources, made by manifests.checks.vendor."""


def violations(item: Object) -> tuple[str, ...]:
    """One sentence for each thing in which ``item`` does not fit its schema."""
    # Overlays have most of their objects in common.
    return _violations(json.dumps(item, sort_keys=True))


@cache
def _violations(text: str) -> tuple[str, ...]:
    item = json.loads(text)
    group, _, version = item["apiVersion"].rpartition("/")
    path = FOLDER / f"{group}_{version}_{item['kind']}.json"
    if path.is_file():
        return tuple(f"{_place(error)}: {error.message[:300]}" for error in _validator(path).iter_errors(item))
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(str(part) for part in error.path)}: {error.message[:300]}",)
    except kubernetes_validate.SchemaNotFoundError:
        return (f"there is no schema of {item['apiVersion']} {item['kind']}; add it in manifests/checks/vendor.py",)
    return ()


def _place(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "(object)"


@cache
def _validator(path: Path) -> Any:
    return jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
