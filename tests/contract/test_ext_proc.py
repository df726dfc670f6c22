"""The description of Envoy's messages against Envoy's published API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrace.picker.ext_proc import MESSAGES, ONEOFS, OVERWRITE

XDS_PROTOS = "xds-protos==1.85.0"

# Runs in an environment of its own: the package brings old opentelemetry.proto modules.
READ = """
import importlib, json, sys
for module in ("service.ext_proc.v3.external_processor", "config.core.v3.base", "type.v3.http_status"):
    importlib.import_module(f"envoy.{module}_pb2")
from google.protobuf import descriptor_pool
pool = descriptor_pool.Default()
kinds = {9: "string", 12: "bytes", 8: "bool", 14: "enum"}
messages = {}
for name in json.load(sys.stdin):
    messages[name] = {
        field.name: [
            field.number,
            "*" * field.is_repeated + (kinds.get(field.type) or field.message_type.full_name),
            field.containing_oneof.name if field.containing_oneof else "",
        ]
        for field in pool.FindMessageTypeByName(name).fields
    }
action = pool.FindEnumTypeByName("envoy.config.core.v3.HeaderValueOption.HeaderAppendAction")
print(json.dumps([messages, action.values_by_name["OVERWRITE_IF_EXISTS_OR_ADD"].number]))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, list[object]]], int]:
    target = tmp_path_factory.mktemp("xds")
    uv = Path(sys.executable).parent / "uv"
    command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", target, XDS_PROTOS]
    subprocess.run(command, check=True, timeout=100)
    answer = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{READ}"],
        input=json.dumps(list(MESSAGES)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    messages, overwrite = json.loads(answer.stdout)
    return messages, overwrite


def test_every_field_is_as_published(published: tuple[dict[str, dict[str, list[object]]], int]) -> None:
    messages, overwrite = published
    for name, fields in MESSAGES.items():
        oneof, members = ONEOFS.get(name, ("", range(0)))
        for field, (number, kind) in fields.items():
            expected = [number, kind, oneof if number in members else ""]
            assert messages[name][field] == expected, f"{name}.{field}"
    assert overwrite == OVERWRITE
