"""Tokens per expert, summed by the torch of the vLLM environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from llmtrace.stack import cache_home

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
VLLM = cache_home() / "vllm" / "0.32.0" / "bin" / "python"


@pytest.mark.timeout(240)
@pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}; `llmtrace up` installs it")
def test_tokens_of_requests_are_counted_and_no_others(tmp_path: Path) -> None:
    done = subprocess.run(
        ["nice", VLLM, HERE / "vllm_expert_tokens.py"],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before any layer": None,
        "warm-up": [0, 0, 0, 0],
        "two tokens and a padded one, in two layers": [2, 4, 1, 1],
        "nothing since": [0, 0, 0, 0],
        "shared experts": [3, 1, 0, 0],
        "a dummy pass": [0, 0, 0, 0],
        "two steps, and layers of a draft model": [0, 0, 7, 7],
        "what was taken stays": [0, 1, 1, 0],
    }
