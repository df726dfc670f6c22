"""Check everything that can be applied, and every component on a scenario: ``python -m manifests.checks``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from llmtrace.errors import UserError
from manifests.checks import flows, references, schemas, security
from manifests.checks.render import COMPONENTS, OVERLAYS, Object, name_of, render


def variants() -> Iterator[tuple[str, list[Object]]]:
    """What is checked, with its name: the overlays, and the components on both kinds of model servers."""
    for overlay in OVERLAYS:
        yield overlay, render(overlay)
    for component in COMPONENTS:
        for scenario in ("scenarios/pd-disaggregation", "scenarios/wide-ep"):
            yield f"{scenario} with {component}", render(scenario, [component])


def main() -> int:
    """Print what is wrong; returns the exit code."""
    wrong: list[str] = []
    seen: set[str] = set()
    try:
        for name, items in variants():
            for item in items:
                text = json.dumps(item, sort_keys=True)
                if text not in seen:
                    wrong += (f"{name}: {name_of(item)}: {sentence}" for sentence in schemas.violations(item))
                seen.add(text)
            for check in (security, references, flows):
                wrong += (f"{name}: {sentence}" for sentence in check.violations(items))
    except UserError as error:
        wrong.append(str(error))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        print(f"{len(seen)} objects of {len(OVERLAYS)} overlays and {len(COMPONENTS)} components are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
