"""Digests of the code that long-running processes of the kit run, so that an update restarts them."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
COMMON = (
    *("errors.py", "telemetry.py", "service.py", "spans.py", "flags.py", "durations.py"),
    *("endpoints_file.py", "watch.py", "semconv/attributes.py", "deploy/supervisor.py"),
)
PARTS = {
    "services": (*COMMON, "picker", "sidecar", "traces", "autoscale"),
    "engine": ("__init__.py", "semconv/attributes.py", "engine"),
}
"""What a process of this kind imports from the package: the kit's own services; the plugin in a model server."""


def digest(part: str) -> str:
    """Hexadecimal digest over the sources of one of :data:`PARTS`."""
    total = hashlib.sha256()
    for name in PARTS[part]:
        path = PACKAGE / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            total.update(f"{file.relative_to(PACKAGE)}\0".encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


def digests() -> dict[str, str]:
    """The digest of each part."""
    return {part: digest(part) for part in PARTS}
