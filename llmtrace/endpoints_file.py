"""llm-d's endpoints file: the model servers of a pool, in YAML or JSON, reread when it changes.

Source: llm-d-router, the plugin file-discovery of pkg/epp.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmtrace.errors import UserError
from llmtrace.watch import watch

MAX_FILE_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class EndpointEntry(BaseModel):
    """One endpoint: an IPv4 address and a port, as strings."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str = Field(min_length=1)
    address: str
    port: str
    namespace: str = "default"
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("address")
    @classmethod
    def _ipv4(cls, value: str) -> str:
        try:
            return str(ipaddress.IPv4Address(value))
        except ValueError:
            raise ValueError(f"{value!r} is no IPv4 address") from None

    @field_validator("port")
    @classmethod
    def _port(cls, value: str) -> str:
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 65535):
            raise ValueError(f"{value!r} is no port from 1 to 65535")
        return value


class _Content(BaseModel):
    """The file's content."""

    model_config = ConfigDict(strict=True)

    endpoints: list[EndpointEntry] = Field(default_factory=list)


def read(path: Path) -> bytes:
    """Content of an endpoints file; raises UserError where it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"the endpoints file {path} cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"the endpoints file {path} is larger than 1 MiB: split the pool")
    return raw


def parse(raw: bytes, path: Path) -> list[EndpointEntry]:
    """Endpoints of a file's content; raises UserError where it says something impossible."""
    try:
        content: Any = yaml.safe_load(raw)
        found = _Content.model_validate({} if content is None else content).endpoints
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise UserError(f"the endpoints file {path} is wrong at {where}: {first['msg']}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the endpoints file {path} is no YAML: {' '.join(str(error).split())}") from None
    names = [(entry.namespace, entry.name) for entry in found]
    if twice := {"/".join(name) for name in names if names.count(name) > 1}:
        raise UserError(f"the endpoints file {path} names {', '.join(sorted(twice))} more than once")
    return found


class EndpointsFile:
    """A file that is given to ``use`` as a whole, at first and after each change."""

    def __init__(self, path: Path, use: Callable[[list[EndpointEntry]], None]) -> None:
        self._path = path
        self._use = use
        self._raw: bytes | None = None

    def load(self) -> None:
        """Read the file, if it changed since the last time; raises UserError where that cannot be."""
        raw = read(self._path)
        if raw == self._raw:
            return
        self._raw = raw
        entries = parse(raw, self._path)
        _log.info("%s: %d endpoints", self._path, len(entries))
        self._use(entries)

    async def watch(self) -> None:
        """Take up changes; what cannot be read is logged, and what was read before stays."""
        await watch(self._path.parent, self.load, "the endpoints stay as they were")
