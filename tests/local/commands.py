"""The llmtrace command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

TIMEOUT_S = 500


def llmtrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from llmtrace.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, **environment}
    )
