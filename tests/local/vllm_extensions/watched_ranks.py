"""A worker extension for tests: tells which experts vLLM chose, and makes one rank slow while a file says so.

Both by way of files in the folder WATCHED_RANKS_FOLDER. ``routed-RANK`` holds the tokens of each expert as 64-bit
numbers, from vLLM's own capture hook for routed experts (``BaseRouter.capture_fn``): its output of them needs a model
runner that does not run on CPUs. ``slow`` holds the rank and the milliseconds by which each MoE layer takes longer.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from cpu_expert_parallel import CpuExpertParallel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_FOLDER = Path(os.environ["WATCHED_RANKS_FOLDER"])
_apply = CPUUnquantizedExperts.apply
_init = BaseRouter.__init__
_dummy_run = GPUModelRunner._dummy_run


class WatchedRanks(CpuExpertParallel):
    """Has nothing: importing this module is what it is for."""


class _Routed:
    def __init__(self) -> None:
        self.dummy = False
        self.tokens: Any = None

    def capture(self, experts: int, topk_ids: Any) -> None:
        if self.dummy:
            return
        if self.tokens is None:
            path = _FOLDER / f"routed-{dist.get_rank()}"
            self.tokens = np.memmap(path, dtype=np.int64, mode="w+", shape=(experts,))
        self.tokens += np.bincount(topk_ids.reshape(-1).numpy(), minlength=experts)
        self.tokens.flush()


_routed = _Routed()


def init(self: Any, top_k: int, global_num_experts: int, *args: Any, **kwargs: Any) -> None:
    _init(self, top_k, global_num_experts, *args, **kwargs)
    self.capture_fn = lambda topk_ids: _routed.capture(global_num_experts, topk_ids)


def dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Dummy steps, and vLLM's profiling at start."""
    _routed.dummy = True
    try:
        return _dummy_run(self, *args, **kwargs)
    finally:
        _routed.dummy = False


def apply(self: Any, *args: Any, **kwargs: Any) -> None:
    with suppress(FileNotFoundError):
        rank, delay_ms = (_FOLDER / "slow").read_text().split()
        if dist.get_rank() == int(rank):
            time.sleep(float(delay_ms) / 1000)
    _apply(self, *args, **kwargs)


BaseRouter.__init__ = init
GPUModelRunner._dummy_run = dummy_run
CPUUnquantizedExperts.apply = apply
