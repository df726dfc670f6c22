"""A worker extension for tests: one rank computes its experts more slowly, while a file is there.

SLOW_RANK_FILE names the file; it holds the rank and the milliseconds by which each MoE layer takes longer.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from cpu_expert_parallel import CpuExpertParallel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_FILE = Path(os.environ["SLOW_RANK_FILE"])
_apply = CPUUnquantizedExperts.apply


class SlowRank(CpuExpertParallel):
    """Has nothing: importing this module is what it is for."""


def apply(self: Any, *args: Any, **kwargs: Any) -> None:
    if _FILE.exists():
        rank, delay_ms = _FILE.read_text().split()
        if dist.get_rank() == int(rank):
            time.sleep(float(delay_ms) / 1000)
    _apply(self, *args, **kwargs)


CPUUnquantizedExperts.apply = apply
