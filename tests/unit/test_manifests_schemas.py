"""Schemas of custom resources: which there are, and what becomes of a definition."""

from __future__ import annotations

import json

import jsonschema
import pytest

from manifests.checks.schemas import FOLDER, violations
from manifests.checks.vendor import SOURCES, closed

DEFINITION = {
    "description": "A thing.",
    "type": "object",
    "x-kubernetes-validations": [{"rule": "true"}],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["size"],
            "properties": {
                "size": {"type": "integer", "description": "How large."},
                "description": {"type": "string"},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
            },
        }
    },
}


def test_every_kind_that_is_wanted_has_its_schema() -> None:
    kinds = {kind for source in SOURCES for kind in source.kinds}
    assert sorted(path.stem.rpartition("_")[2] for path in FOLDER.glob("*.json")) == sorted(kinds)
    assert all(source.checksum.startswith("h1:") and len(source.files) >= 1 for source in SOURCES)


def test_prose_goes_and_fields_of_such_names_stay() -> None:
    text = json.dumps(closed(DEFINITION, top=True))
    assert "How large" not in text
    assert "A thing" not in text
    assert "x-kubernetes" not in text
    assert "description" in closed(DEFINITION, top=True)["properties"]["spec"]["properties"]


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        ({"size": 1}, True),
        ({"size": 1, "description": "d", "labels": {"any": "value"}, "list": [{"a": "b"}]}, True),
        ({"size": 1, "free": {"of": {"rules": 1}}}, True),
        ({}, False),
        ({"size": "1"}, False),
        ({"size": 1, "sizes": 2}, False),
        ({"size": 1, "labels": {"any": 1}}, False),
        ({"size": 1, "list": [{"b": "a"}]}, False),
    ],
)
def test_what_fits(spec: object, fits: bool) -> None:
    item = {"apiVersion": "v1", "kind": "Thing", "metadata": {"name": "any", "labels": {"a": "b"}}, "spec": spec}
    assert jsonschema.Draft202012Validator(closed(DEFINITION, top=True)).is_valid(item) is fits


def test_a_kind_without_a_schema_is_said() -> None:
    item = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "any"}}
    assert violations(item) == ("there is no schema of example.com/v1 Thing; add it in manifests/checks/vendor.py",)
