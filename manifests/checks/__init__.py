"""What is checked of the manifests without a cluster: that they build, fit the schemas, and keep the policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from manifests.checks import flows, references, schemas, security
from manifests.checks.render import Object, name_of


def violations(items: Sequence[Object]) -> Iterator[str]:
    """One sentence for each thing that is wrong with what was rendered."""
    for item in items:
        yield from (f"{name_of(item)}: {sentence}" for sentence in schemas.violations(item))
    for check in (security, references, flows):
        yield from check.violations(items)
