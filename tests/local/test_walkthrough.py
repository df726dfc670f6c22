"""The commands of docs/walkthrough.md do what the walkthrough says.

Each ```console block is run line by line; an HTML comment ``<!-- expect: REGEX -->`` right after a block must match the
real output of that block.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```console\n(?P<body>.*?)```\n(?P<expect>(?:<!-- expect: .*? -->\n)*)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    commands: tuple[str, ...]
    expected: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        commands = tuple(line[2:] for line in match["body"].splitlines() if line.startswith("$ "))
        found.append(Block(commands, tuple(re.findall(r"<!-- expect: (.*?) -->", match["expect"]))))
    return found


WALKTHROUGH = blocks((ROOT / "docs" / "walkthrough.md").read_text())


def test_every_block_states_what_to_expect() -> None:
    assert len(WALKTHROUGH) >= 4
    assert [block.commands for block in WALKTHROUGH if not block.expected] == []


@pytest.mark.stack
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", WALKTHROUGH, ids=lambda block: block.commands[0])
def test_block(block: Block) -> None:
    output = ""
    for command in block.commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=ROOT,
            env=None,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        output += done.stdout + done.stderr
        assert done.returncode == 0, f"{command}\n{output}"
    for pattern in block.expected:
        assert re.search(pattern, output), f"no {pattern!r} in the output of {block.commands}:\n{output}"
