"""approx-prefix-cache-producer: how much of the prompt each endpoint probably has cached, from earlier routing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Handle, Parameters, Producer, SchedulingResult
from llmtrace.picker.prefix_index import PrefixIndex, block_hashes
from llmtrace.picker.prefix_match import DEFAULT_PRODUCER, PrefixMatch
from llmtrace.picker.request import InferenceRequest

MIN_BLOCK_SIZE_TOKENS = 64
"""llm-d raises smaller blocks to this, to bound the index's memory."""
DEFAULT_BLOCK_SIZE_TOKENS = 16
DEFAULT_LRU_CAPACITY = 31250

_log = logging.getLogger(__name__)


class ApproxPrefixCacheParameters(Parameters):
    """llm-d's parameters. Sizes in tokens; ``lru_capacity_per_server`` in blocks.

    ``block_size`` is llm-d's deprecated name of ``block_size_tokens``.
    """

    auto_tune: bool = True
    block_size_tokens: int = DEFAULT_BLOCK_SIZE_TOKENS
    block_size: int = Field(default=0, ge=0)
    max_prefix_blocks_to_match: int = Field(default=2048, ge=0)
    max_prefix_tokens_to_match: int = Field(default=131072, ge=0)
    lru_capacity_per_server: int = Field(default=DEFAULT_LRU_CAPACITY, ge=0)

    @model_validator(mode="after")
    def _sized(self) -> ApproxPrefixCacheParameters:
        if not self.auto_tune and self.tokens <= 0:
            raise ValueError("blockSizeTokens must be more than 0 where autoTune is off")
        return self

    @property
    def tokens(self) -> int:
        """The configured block size."""
        deprecated = self.block_size > 0 and self.block_size_tokens == DEFAULT_BLOCK_SIZE_TOKENS
        return self.block_size if deprecated else self.block_size_tokens


@REGISTRY.register
class ApproxPrefixCacheProducer(Producer[ApproxPrefixCacheParameters]):
    """Hashes the prompt in blocks and looks them up among those that it sent to each endpoint before."""

    type: ClassVar[str] = DEFAULT_PRODUCER
    parameters_type = ApproxPrefixCacheParameters

    def __init__(self, name: str, parameters: ApproxPrefixCacheParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        self._index = PrefixIndex()
        handle.pool.on_removal(self._index.remove)
        handle.metrics.prefix_size.labels(name, self.type).set_function(lambda: len(self._index))
        self._hit_ratio = handle.metrics.prefix_hit_ratio.labels(name, self.type)
        if parameters.tokens < MIN_BLOCK_SIZE_TOKENS and not parameters.auto_tune:
            _log.warning(
                "plugin %s: blockSizeTokens %d is raised to %d, as llm-d does",
                name,
                parameters.tokens,
                MIN_BLOCK_SIZE_TOKENS,
            )

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put a :class:`PrefixMatch` into the request's data."""
        size = self._block_size(endpoints)
        limit = self._max_blocks(size)
        hashes = [block_hashes(p, size, request.model, request.cache_salt, limit) for p in request.prompts]
        blocks: dict[str, int] = {}
        for prompt in hashes:
            for endpoint, matched in self._index.match(prompt).items():
                blocks[endpoint] = blocks.get(endpoint, 0) + matched
        total = sum(map(len, hashes))
        request.data[self.name] = PrefixMatch(blocks, total, size, request.prompt_tokens, hashes)

    def scheduled(self, request: InferenceRequest, result: SchedulingResult) -> None:
        """From now on the prompt counts as cached by the endpoint of the request, and by that of its prefill."""
        match: PrefixMatch = request.data[self.name]
        if match.total_blocks:
            self._hit_ratio.observe(match.blocks.get(result.endpoints[0].id, 0) / match.total_blocks)
        for endpoint in result.holders:
            capacity = self._capacity(endpoint)
            for prompt in match.hashes:
                self._index.add(prompt, endpoint.id, capacity)

    def _block_size(self, endpoints: Sequence[Endpoint]) -> int:
        size = self.parameters.tokens
        if self.parameters.auto_tune and endpoints and endpoints[0].load.block_size > 0:
            size = endpoints[0].load.block_size
        return max(size, MIN_BLOCK_SIZE_TOKENS)

    def _max_blocks(self, block_size: int) -> int | None:
        if self.parameters.max_prefix_tokens_to_match > 0:
            return self.parameters.max_prefix_tokens_to_match // block_size
        return self.parameters.max_prefix_blocks_to_match or None

    def _capacity(self, endpoint: Endpoint) -> int:
        if self.parameters.auto_tune and endpoint.load.num_blocks > 0:
            return endpoint.load.num_blocks
        return self.parameters.lru_capacity_per_server or DEFAULT_LRU_CAPACITY
