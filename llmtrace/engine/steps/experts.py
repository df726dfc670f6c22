"""Tokens of each expert, summed on the device over layers and sampled steps, without waiting for it.

What counts is decided by a tensor of weights, one for each place of a batch: 1 for a request's token in a sampled step,
0 for all else. So the sum is right in a CUDA graph too, where no Python runs. Where it runs, other steps do nothing.
"""

from __future__ import annotations

from typing import Any


class ExpertTokens:
    """The sums of one rank. ``most_tokens`` is the largest batch; ``torch`` the library.

    ``part``: of each batch, cut into parts of one size, the rank routes this one (sequence parallelism); 0 for all.
    """

    def __init__(self, torch: Any, most_tokens: int, part: int = 0) -> None:
        self.on = True
        """Whether layers have to call :meth:`count`: in sampled steps, and before the first step of all, when vLLM
        captures its CUDA graphs."""
        self._torch = torch
        self._most = most_tokens
        self._part = part
        self._weights: Any = None
        self._sums: Any = None
        self._experts = 0

    def count(self, chosen: Any, experts: int) -> None:
        """``chosen`` are the logical experts of each token of a layer: tokens by choices."""
        torch = self._torch
        places, choices = chosen.shape
        if self._sums is None:
            self._experts = experts
            with torch.inference_mode(mode=False):  # else they could not be changed between forward passes
                # One more for ids that are none of the logical experts': fused shared ones.
                self._sums = torch.zeros(experts + 1, dtype=torch.int64, device=chosen.device)
                self._weights = torch.zeros((self._most, choices), dtype=torch.int64, device=chosen.device)
        first = self._part * places
        if first + places > self._most or choices != self._weights.shape[1]:
            return  # another model's: a draft
        ids = chosen if chosen.dtype in (torch.int32, torch.int64) else chosen.long()
        self._sums.index_add_(
            0, ids.reshape(-1).clamp(0, self._experts), self._weights[first : first + places].reshape(-1)
        )

    def begin(self, tokens: int) -> None:
        """A sampled step of so many requests' tokens is next: they are the first of the batch."""
        self.on = True
        if self._weights is not None:
            self._weights[:tokens].fill_(1)

    def end(self) -> None:
        """It is over; what is computed until the next one counts for nothing."""
        self.on = False
        if self._weights is not None:
            self._weights.fill_(0)

    def take(self) -> Any:
        """The sums since last time, in a tensor of the host that the device fills in its own time; None of none."""
        if self._sums is None:
            return None
        taken = self._sums[: self._experts].clone()
        self._sums.fill_(0)
        if taken.device.type == "cpu":
            return taken
        host = self._torch.empty(taken.shape, dtype=taken.dtype, pin_memory=True)
        host.copy_(taken, non_blocking=True)
        return host
