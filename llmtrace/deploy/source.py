"""A digest of the code that long-running processes of the kit run, so that an update restarts them."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PARTS = ("errors.py", "telemetry.py", "semconv/attributes.py", "picker", "traces")


def digest() -> str:
    """Hexadecimal digest over the sources of picker and store and what they import from the package."""
    total = hashlib.sha256()
    for part in PARTS:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            total.update(f"{file.relative_to(PACKAGE)}\0".encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:16]
