"""Objects against Kubernetes' schemas, and custom resources against those of their own definitions.

Unknown fields are errors, as for the API server with strict field validation. Rules in CEL (x-kubernetes-validations)
are not evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from manifests.checks.render import Object

KUBERNETES = "1.34"
FOLDER = Path(__file__).with_name("crds")
"""Schemas of custom resources, made by manifests.checks.vendor."""


def violations(item: Object) -> Iterator[str]:
    """One sentence for each thing in which ``item`` does not fit its schema."""
    group, _, version = item["apiVersion"].rpartition("/")
    path = FOLDER / f"{group}_{version}_{item['kind']}.json"
    if path.is_file():
        for error in _validator(path).iter_errors(item):
            yield f"{_place(error)}: {error.message[:300]}"
        return
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message[:300]}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"there is no schema of {item['apiVersion']} {item['kind']}; add it in manifests/checks/vendor.py"


def _place(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "(object)"


@cache
def _validator(path: Path) -> Any:
    return jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
