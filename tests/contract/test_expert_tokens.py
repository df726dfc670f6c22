"""Tokens per expert, summed by the torch of the vLLM environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_scripts import needs_vllm, printed


@pytest.mark.timeout(240)
@needs_vllm
def test_tokens_of_requests_are_counted_and_no_others(tmp_path: Path) -> None:
    assert printed("vllm_expert_tokens.py", tmp_path) == {
        "before any layer": None,
        "warm-up": [0, 0, 0, 0],
        "two tokens and a padded one, in two layers": [2, 4, 1, 1],
        "nothing since": [0, 0, 0, 0],
        "shared experts": [3, 1, 0, 0],
        "a dummy pass": [0, 0, 0, 0],
        "two steps, and layers of a draft model": [0, 0, 7, 7],
        "what was taken stays": [0, 1, 1, 0],
        "part 0 of a batch of three tokens and a padded one": [2, 1, 1, 0],
        "part 1 of a batch of three tokens and a padded one": [1, 0, 0, 1],
    }
