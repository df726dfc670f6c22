"""What vLLM's CPU back end lacks for expert parallelism, for the local profile and its tests only: no GPU needs it.

vLLM 0.32 picks its all-gather and reduce-scatter back end for expert parallelism on CPUs too, but the CPU communicator
lacks both collectives, and its experts take no notice of which of them a rank has. This fills the two gaps, with gloo
and without regard to speed. Named on the command line: ``--worker-extension-cls
cpu_expert_parallel.CpuExpertParallel``; vLLM then imports it in each worker, before the model is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class CpuExpertParallel:
    """Has nothing: importing this module is what it is for."""


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of all ranks, one after the other; ``sizes`` are each rank's."""
    tensors = input_ if isinstance(input_, list) else [input_]
    gathered = []
    for tensor in tensors:
        rows = sizes or [tensor.shape[0]] * self.world_size
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=self.device_group)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)]))
    return gathered if isinstance(input_, list) else gathered[0]


def reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    """The rank's own rows of the sum over all ranks."""
    rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.contiguous().clone()
    dist.all_reduce(total, group=self.device_group)
    start = sum(rows[: self.rank_in_group])
    return total[start : start + rows[self.rank_in_group]].contiguous()


_apply = CPUUnquantizedExperts.apply


def apply(
    self: Any,
    output: Any,
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    activation: Any,
    global_num_experts: int,
    expert_map: Any,
    **more: Any,
) -> None:
    """Only tokens with an expert of this rank are computed; what other ranks have counts for nothing."""
    same = {"w1": w1, "w2": w2, "activation": activation, "global_num_experts": global_num_experts, **more}
    if expert_map is None:
        _apply(self, output, hidden_states, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **same)
        return
    local = expert_map[topk_ids.long()]
    here = local >= 0
    rows = here.any(dim=1).nonzero().squeeze(1)
    output.zero_()
    if not len(rows):
        return
    here, local = here[rows], local[rows]
    # The kernel takes an expert for each choice: those of other ranks go to one that is here, with weight 0.
    some = local.max(dim=1, keepdim=True).values
    part = torch.empty((len(rows), output.shape[1]), dtype=output.dtype)
    _apply(
        self,
        part,
        hidden_states[rows].contiguous(),
        topk_weights=torch.where(here, topk_weights[rows], 0).to(topk_weights.dtype),
        topk_ids=torch.where(here, local, some).to(topk_ids.dtype),
        expert_map=None,
        **same,
    )
    output[rows] = part


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv
CPUUnquantizedExperts.apply = apply
