"""Lay the ConfigMap's files out as the installed package ``llmtrace``: ``install.py SOURCE TARGET``.

A key ``llmtrace.engine.plugin.py`` becomes ``TARGET/llmtrace/engine/plugin.py``; ``entry_points.txt`` is where Python
looks for the entry points of a distribution, of which vLLM loads those of the group ``vllm.general_plugins``.
"""

import shutil
import sys
from pathlib import Path


def install(source: Path, target: Path) -> None:
    """Copy what is in ``source`` to where it belongs in ``target``."""
    metadata = target / "llmtrace-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtrace\nVersion: 0\n")
    shutil.copyfile(source / "entry_points.txt", metadata / "entry_points.txt")
    for module in source.glob("llmtrace.*.py"):
        place = target.joinpath(*module.stem.split(".")).with_suffix(".py")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, place)


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]))
