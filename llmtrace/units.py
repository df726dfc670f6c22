"""Quantities as text for people."""

from __future__ import annotations

MEGABYTE = 1_000_000


def bytes_text(count: float) -> str:
    """Bytes in a unit that fits: 47.2 MB, 13 kB."""
    if count >= MEGABYTE:
        return f"{count / MEGABYTE:,.1f} MB"
    return f"{count / 1000:,.0f} kB" if count >= 1000 else f"{count:.0f} B"
