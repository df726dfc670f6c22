"""precise-prefix-cache-producer: how much of the prompt each endpoint has cached, from the events of its KV cache."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from opentelemetry.trace import SpanKind
from pydantic import Field

from llmtrace.durations import Duration
from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.kv_events import Message
from llmtrace.picker.kv_index import KVBlockIndex
from llmtrace.picker.kv_subscription import Source, Subscriptions
from llmtrace.picker.plugin import REGISTRY, Handle, Others, Parameters, Producer, SchedulingResult
from llmtrace.picker.prefix_match import PrefixMatch, prefix_match
from llmtrace.picker.request import BYTES_PER_TOKEN, InferenceRequest
from llmtrace.semconv import attributes as a
from llmtrace.spans import Span

SCOPE = "llm-d-router/pkg/epp/framework/plugins/requestcontrol"
INDEX_SCOPE = "llm-d-router/pkg/kvcache/kvblock"
DEFAULT_BLOCK_SIZE_TOKENS = 16
DEFAULT_INDEX_SIZE = 1_000_000
DEFAULT_SPECULATIVE_TTL_S = 2.0
NO_TOKENS = "skipped_no_tokens"

_ADDRESS = re.compile(r"tcp://[\w.-]+:[1-9]\d{0,4}|ipc://.+", re.ASCII)

_log = logging.getLogger(__name__)


class TokenProcessorConfig(Parameters):
    """Blocks of the picker's own, in tokens; ``block_size`` is llm-d's deprecated name. 0 stands for the default.

    ``hash_seed`` goes into the keys of blocks; it need not be that of the servers.
    """

    block_size_tokens: int = Field(default=0, ge=0)
    block_size: int = Field(default=0, ge=0)
    hash_seed: str = ""

    @property
    def tokens(self) -> int:
        """The configured block size."""
        return self.block_size_tokens or self.block_size or DEFAULT_BLOCK_SIZE_TOKENS


class InMemoryConfig(Parameters):
    """``size``: the number of blocks kept for each endpoint (llm-d: for all of them, 1e8)."""

    size: int = Field(default=DEFAULT_INDEX_SIZE, gt=0)


class KVBlockIndexConfig(Parameters):
    """The index; ``enable_metrics`` of its lookups and its growth."""

    in_memory_config: InMemoryConfig = InMemoryConfig()
    enable_metrics: bool = False


class IndexerConfig(Parameters):
    """Where the index is kept: in memory."""

    kv_block_index_config: KVBlockIndexConfig = KVBlockIndexConfig()


class PodDiscoveryConfig(Parameters):
    """Ports at which every endpoint publishes its events and replays them; a replay port of 0 or less: no replays.

    An endpoint's labels may name other addresses: servers on one machine need them, and sockets that are no ports.
    """

    socket_port: int = Field(default=5557, ge=1, le=65535)
    replay_socket_port: int = Field(default=0, le=65535)


class KVEventsConfig(Parameters):
    """The subscriptions. ``concurrency`` is of llm-d's worker threads; the embedded picker has one event loop."""

    topic_filter: str = "kv@"
    concurrency: int = Field(default=4, gt=0)
    engine_type: Literal["vllm"] = "vllm"
    discover_pods: Literal[True] = True
    pod_discovery_config: PodDiscoveryConfig = PodDiscoveryConfig()


class PrecisePrefixCacheParameters(Parameters):
    """llm-d's parameters; ``speculative_ttl`` in seconds."""

    token_processor_config: TokenProcessorConfig = TokenProcessorConfig()
    indexer_config: IndexerConfig = IndexerConfig()
    kv_events_config: KVEventsConfig = Field(default=KVEventsConfig())
    speculative_indexing: bool = False
    speculative_ttl: Duration = Field(default=DEFAULT_SPECULATIVE_TTL_S, alias="speculativeTTL")


@REGISTRY.register
class PrecisePrefixCacheProducer(Producer[PrecisePrefixCacheParameters]):
    """Keeps an index of the blocks in each endpoint's KV cache, and looks the prompt's blocks up in it."""

    type: ClassVar[str] = "precise-prefix-cache-producer"
    parameters_type = PrecisePrefixCacheParameters

    def __init__(self, name: str, parameters: PrecisePrefixCacheParameters, handle: Handle) -> None:
        super().__init__(name, parameters, handle)
        processor, index = parameters.token_processor_config, parameters.indexer_config.kv_block_index_config
        self._index = KVBlockIndex(processor.tokens, processor.hash_seed, index.in_memory_config.size)
        self._metrics = handle.metrics.kv_cache
        self._count_index = index.enable_metrics
        self._subscriptions = Subscriptions(
            handle.pool, self._source, parameters.kv_events_config.topic_filter, self, self._metrics
        )
        handle.metrics.prefix_size.labels(name, self.type).set_function(lambda: len(self._index))
        self._hit_ratio = handle.metrics.prefix_hit_ratio.labels(name, self.type)
        self._tracer = handle.tracer.scoped(SCOPE)
        self._index_tracer = handle.tracer.scoped(INDEX_SCOPE)
        self._complaints: set[tuple[str, str]] = set()

    def connect(self, others: Others) -> None:
        """Blocks are those of tokens."""
        others.tokenizer(f"plugin {self.name!r}")

    async def run(self) -> None:
        """Follow the endpoints' events."""
        await self._subscriptions.run()

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Put a :class:`PrefixMatch` into the request's data, if its tokens are known."""
        with request.span.child(a.PRECISE_SPAN, tracer=self._tracer) as span:
            span.attributes = {a.PRODUCER_CANDIDATES: len(endpoints), a.REQUEST_ID: request.id}
            if request.model:
                span.attributes[a.REQUEST_MODEL] = request.model
            if not request.tokenized:
                span.attributes[a.PRODUCER_RESULT] = NO_TOKENS
                return
            keys = [self._index.keys(prompt, request.model, request.cache_salt) for prompt in request.prompts]
            blocks: dict[str, int] = {}
            for prompt, prompt_keys in zip(request.prompts, keys, strict=True):
                found = self._lookup(prompt_keys, len(prompt) // BYTES_PER_TOKEN, endpoints, span)
                for endpoint, matched in found.items():
                    blocks[endpoint] = blocks.get(endpoint, 0) + matched
            total = sum(map(len, keys))
            match = PrefixMatch(blocks, total, self._index.block_size_tokens, request.prompt_tokens, keys)
            request.data[self.name] = match
            span.attributes[a.PRODUCER_BLOCKS] = match.total_blocks
            span.attributes[a.PRODUCER_MAX_MATCH] = max(blocks.values(), default=0)

    def scheduled(self, request: InferenceRequest, result: SchedulingResult) -> None:
        """Where speculative, count on the prompt's blocks at the endpoints that will have them, for a while."""
        match = prefix_match(request, self.name)
        if match is None:
            return
        if match.total_blocks:
            self._hit_ratio.observe(match.blocks.get(result.endpoints[0].id, 0) / match.total_blocks)
        if self.parameters.speculative_indexing:
            until = time.monotonic() + self.parameters.speculative_ttl
            for endpoint in result.holders:
                for keys in match.hashes:
                    self._index.expect(endpoint.id, keys, until)

    def apply(self, endpoint: str, message: Message) -> None:
        """Take an endpoint's events into the index; each kind of change is a trace of its own."""
        add = self._index_tracer.start(a.INDEX_ADD_SPAN, None, SpanKind.INTERNAL)
        evict = self._index_tracer.start(a.INDEX_EVICT_SPAN, None, SpanKind.INTERNAL)
        changes = self._index.apply(endpoint, message.model, message.batch)
        common = {a.ENDPOINT_NAME: endpoint}
        if changes.stored:
            add.attributes = {
                **common,
                a.ADD_ENGINE_KEYS: changes.stored,
                a.ADD_REQUEST_KEYS: changes.stored,
                a.ADD_POD_ENTRIES: 1,
                a.ADD_DEVICE_TIERS: len(changes.media),
            }
            add.end()
        if changes.removed:
            evict.attributes = {
                **common,
                a.EVICT_KEY_TYPE: "engine",
                a.EVICT_POD_ENTRIES: 1,
                a.EVICT_DEVICE_TIERS: len(changes.media),
            }
            evict.end()
        if self._count_index:
            self._metrics.admissions.inc(changes.stored)
            self._metrics.evictions.inc(changes.removed)
        for (kind, reason), number in changes.skipped.items():
            self._metrics.skipped.labels(kind, reason).inc(number)
            self._complain(endpoint, reason, f"blocks of its KV cache ({kind}) are left out of the index: {reason}")

    def forget(self, endpoint: str) -> None:
        """The endpoint's cache is empty, or the endpoint is gone."""
        self._index.forget(endpoint)
        self._complaints = {complaint for complaint in self._complaints if complaint[0] != endpoint}

    def _lookup(
        self, keys: Sequence[int], tokens: int, endpoints: Sequence[Endpoint], parent: Span
    ) -> Mapping[str, int]:
        with parent.child(a.INDEX_LOOKUP_SPAN, tracer=self._index_tracer) as span:
            found = self._index.match(keys, tokens, [endpoint.id for endpoint in endpoints], time.monotonic())
            best = max(found.values(), default=0)
            span.attributes = {
                a.LOOKUP_BLOCKS: len(keys),
                a.LOOKUP_PODS: len(endpoints),
                a.LOOKUP_HIT: best > 0,
                a.LOOKUP_FOUND: best,
            }
            if self._count_index:
                self._metrics.lookups.inc()
                self._metrics.hits.inc(best)
        return found

    def _source(self, endpoint: Endpoint) -> Source | None:
        """Where an endpoint publishes; None where its labels name no ZMQ address."""
        ports = self.parameters.kv_events_config.pod_discovery_config
        address = endpoint.labels.get(a.KV_EVENTS_LABEL, f"tcp://{endpoint.host}:{ports.socket_port}")
        default = f"tcp://{endpoint.host}:{ports.replay_socket_port}" if ports.replay_socket_port > 0 else ""
        replay = endpoint.labels.get(a.KV_EVENTS_REPLAY_LABEL, default)
        for label in (address, replay) if replay else (address,):
            if not _ADDRESS.fullmatch(label):
                self._complain(endpoint.id, label, f"{label!r} is no ZMQ address such as tcp://10.0.0.7:5557")
                return None
        return Source(endpoint.id, address, replay)

    def _complain(self, endpoint: str, about: str, sentence: str) -> None:
        """Say it once."""
        if (endpoint, about) not in self._complaints:
            self._complaints.add((endpoint, about))
            _log.warning("endpoint %s: %s", endpoint, sentence)
