"""Scripts of these tests that run with vLLM's Python, in the environment that ``llmtrace up`` installs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtrace.stack import cache_home

HERE = Path(__file__).parent
VERSION = "0.32.0"
PYTHON = cache_home() / "vllm" / VERSION / "bin" / "python"
TIMEOUT_S = 220
SILENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; `llmtrace up` installs it")


def printed(script: str, folder: Path) -> Any:
    """The JSON that a script of this folder prints; it runs in ``folder``, and can import llmtrace."""
    done = subprocess.run(
        ["nice", PYTHON, HERE / script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=folder,
        env={**os.environ, **SILENT, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
