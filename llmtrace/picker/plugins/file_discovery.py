"""file-discovery: endpoints from a YAML or JSON file, reread when it changes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from llmtrace.endpoints_file import EndpointEntry, EndpointsFile
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Discovery, Handle, Parameters


class FileDiscoveryParameters(Parameters):
    """``path`` of the endpoints file; ``watch_file`` to take up changes while running."""

    path: str = Field(min_length=1)
    watch_file: bool = False


@REGISTRY.register
class FileDiscovery(Discovery[FileDiscoveryParameters]):
    """Reconciles the pool with the file. A change that cannot be read is logged, and the pool stays as it was."""

    type: ClassVar[str] = "file-discovery"
    parameters_type = FileDiscoveryParameters

    def __init__(self, name: str, parameters: FileDiscoveryParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        self._file = EndpointsFile(Path(parameters.path), self._replace)

    def load(self) -> None:
        """Read the file into the pool, if it changed since the last time."""
        self._file.load()

    async def watch(self) -> None:
        """Take up changes, where that is asked for."""
        if self.parameters.watch_file:
            await self._file.watch()

    def _replace(self, entries: list[EndpointEntry]) -> None:
        self.handle.pool.replace(Endpoint(e.name, e.namespace, e.address, e.port, e.labels) for e in entries)
