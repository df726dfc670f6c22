"""PromQL as Prometheus' own parser sees it (/api/v1/parse_query)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def nodes(tree: object) -> Iterator[Mapping[str, Any]]:
    """Every node of a parsed query."""
    if isinstance(tree, dict):
        yield tree
        for child in tree.values():
            yield from nodes(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from nodes(child)


def selector(node: Mapping[str, Any]) -> str:
    """The text of a selector's name and labels."""
    return "{" + ",".join(f"{m['name']}{m['type']}{json.dumps(m['value'])}" for m in node["matchers"]) + "}"
