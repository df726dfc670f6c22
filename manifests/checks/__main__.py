"""Check everything that can be applied, and every component on a scenario: ``python -m manifests.checks``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from llmtrace.errors import UserError
from manifests.checks import violations
from manifests.checks.render import COMPONENTS, OVERLAYS, Object, render


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
    count = 0
    try:
        for name, items in variants():
            count += 1
            wrong += (f"{name}: {sentence}" for sentence in violations(items))
    except UserError as error:
        wrong.append(str(error))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        print(f"{count} renderings of {len(OVERLAYS)} overlays and {len(COMPONENTS)} components are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
