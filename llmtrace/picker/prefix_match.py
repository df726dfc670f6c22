"""How much of a prompt each endpoint has in its KV cache: what producers find out, and scorers and deciders read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrace.picker.plugin import Parameters
from llmtrace.picker.request import InferenceRequest

DEFAULT_PRODUCER = "approx-prefix-cache-producer"
"""Name, and type, of the producer whose data is read where the configuration names no other."""


@dataclass(frozen=True)
class PrefixMatch:
    """Cached blocks by endpoint id, out of ``total_blocks`` of ``block_size_tokens`` tokens each.

    An endpoint that ``blocks`` leaves out has none. ``prompt_tokens`` is the prompt's length as the producer knows
    it; the last block of each prompt may be shorter. ``hashes`` of the blocks of each prompt are the producer's own,
    kept until it is known where the request goes. llm-d calls all of it PrefixCacheMatchInfo.
    """

    blocks: Mapping[str, int]
    total_blocks: int
    block_size_tokens: int
    prompt_tokens: int
    hashes: Sequence[Sequence[int]] = ()

    def tokens(self, endpoint: str) -> int:
        """Prompt tokens that the endpoint should have cached."""
        return min(self.blocks.get(endpoint, 0) * self.block_size_tokens, self.prompt_tokens)


class PrefixMatchParameters(Parameters):
    """Parameters of a plugin that reads a :class:`PrefixMatch`."""

    prefix_match_info_producer_name: str = ""

    @property
    def producer(self) -> str:
        """Name of the producer whose data is read."""
        return self.prefix_match_info_producer_name or DEFAULT_PRODUCER


def prefix_match(request: InferenceRequest, producer: str) -> PrefixMatch | None:
    """What the producer of this name found out about the request; None where it found nothing."""
    match = request.data.get(producer)
    return match if isinstance(match, PrefixMatch) else None
