"""Sends a workload through the gateways and records each request as a span of the client."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import httpx
import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from llmtrace.errors import UserError
from llmtrace.scenarios.workload import Chat, Message, Request, Workload
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Attributes

METRICS_TIMEOUT_S = 10.0
MOST_SAID = 240
"""Characters of a server's error message that a person gets to see."""
MOST_FAILURES = 0.1
"""A run in which a larger share of the requests fails ends with an error."""


@dataclass(frozen=True)
class Settings:
    """How requests are sent. Times in seconds.

    ``gateways`` and ``servers`` are base URLs by name, ``roles`` the roles of servers by name; ``arm_facts`` are
    attributes of each arm's blocks.
    """

    scenario: str
    model: str
    gateways: Mapping[str, str]
    servers: Mapping[str, str]
    arms: tuple[str, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    arm_facts: Mapping[str, Attributes] = field(default_factory=dict)
    max_tokens: int = 8
    concurrency: int = 2
    request_timeout_s: float = 60.0
    run_timeout_s: float = 900.0
    warmups: int = 3

    def __post_init__(self) -> None:
        if missing := [arm for arm in self.arms if arm not in self.gateways]:
            raise UserError(
                f"the stack has no gateway for {' and '.join(missing)}, only for "
                f"{', '.join(sorted(self.gateways)) or 'nothing'}; see the inventory"
            )


class RunRecord(BaseModel):
    """What was sent; a convenience for people, never a source of the answer's numbers."""

    run_id: str
    scenario: str
    model: str
    started: datetime
    seconds: float
    workload: dict[str, int]
    concurrency: int
    max_tokens: int
    requests: int
    failed: int
    trace_ids: dict[str, list[str]]

    def save(self, run_dir: Path) -> Path:
        """Write the record under ``run_dir/runs`` and return its path."""
        path = run_dir / "runs" / f"{self.run_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path


def new_run_id() -> str:
    """A run id that sorts by time and does not repeat."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


@dataclass
class Driver:
    """Drives one run; ``progress`` is called once for every request that has ended."""

    settings: Settings
    provider: TracerProvider
    run_id: str = field(default_factory=new_run_id)
    progress: Callable[[str], None] = lambda arm: None
    trace_ids: dict[str, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def tracer(self) -> Tracer:
        """The driver's tracer."""
        return self.provider.get_tracer("llmtrace.scenarios.driver")

    async def run(self, workload: Workload) -> RunRecord:
        """Warm up, then send every block through each arm; raises UserError when too many requests fail."""
        # A full collection over everything that was imported would halt the clock that measures the first token.
        gc.collect()
        gc.freeze()
        started = datetime.now(UTC)
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.run_timeout_s):
                await self._warm_up()
                for block in range(workload.blocks):
                    for arm in workload.arm_order(block, self.settings.arms):
                        await self._block(arm, block, workload.chats(block))
        except TimeoutError:
            raise UserError(
                f"run {self.run_id} did not end within {self.settings.run_timeout_s:g} s;"
                " make it smaller or see `llmtrace status`"
            ) from None
        sent = sum(len(ids) for ids in self.trace_ids.values())
        if len(self.failures) > MOST_FAILURES * sent:
            raise UserError(
                f"{len(self.failures)} of {sent} requests of run {self.run_id} failed, the first with "
                f"{self.failures[0]}; see `llmtrace status`"
            )
        return RunRecord(
            run_id=self.run_id,
            scenario=self.settings.scenario,
            model=self.settings.model,
            started=started,
            seconds=round(time.monotonic() - begin, 3),
            workload={
                "blocks": workload.blocks,
                "conversations": workload.conversations,
                "turns": workload.turns,
                "seed": workload.seed,
            },
            concurrency=self.settings.concurrency,
            max_tokens=self.settings.max_tokens,
            requests=sent,
            failed=len(self.failures),
            trace_ids=self.trace_ids,
        )

    async def send_one(self, arm: str, request: Request) -> str:
        """Send one request outside of any block, and return its trace id; a conversation shares its cache.

        Its trace is to be kept where only a share of them is.
        """
        async with self._client(arm) as client:
            salt = self._salt(arm, request.conversation)
            return await self._send(client, arm, request, salt, {a.SAMPLING_KEEP: True})

    def _salt(self, arm: str, share: str) -> str:
        """A cache_salt of its own for each run, arm and share; vLLM refuses "/" and "@" in it."""
        return f"{self.run_id}:{arm}:{share}"

    @asynccontextmanager
    async def _client(self, arm: str) -> AsyncIterator[AsyncOpenAI]:
        async with AsyncOpenAI(
            base_url=f"{self.settings.gateways[arm]}/v1",
            api_key="none",
            max_retries=0,
            timeout=self.settings.request_timeout_s,
            http_client=DefaultAsyncHttpxClient(trust_env=False, timeout=self.settings.request_timeout_s),
        ) as client:
            yield client

    async def _warm_up(self) -> None:
        """A few short requests by each arm, so that no measured request is the first on its path."""
        message: Message = {"role": "user", "content": "Say good morning."}
        for arm in self.settings.arms:
            async with self._client(arm) as client:
                for n in range(self.settings.warmups):
                    request = Request(f"warmup-{n}", -1, "warmup", f"warmup-{n}", 0, (message,))
                    await self._send(client, arm, request, self._salt(arm, request.pair_id), {a.WARMUP: True})
        if self.failures:
            raise UserError(f"a warm-up request failed with {self.failures[0]}; see `llmtrace status`")

    async def _block(self, arm: str, block: int, chats: Sequence[Chat]) -> None:
        limit = asyncio.Semaphore(self.settings.concurrency)
        salt = self._salt(arm, str(block))
        async with self._client(arm) as client, httpx.AsyncClient(trust_env=False) as metrics:

            async def talk(chat: Chat) -> None:
                await asyncio.sleep(max(chat.at_s - (time.monotonic() - begun), 0.0))
                async with limit:
                    for request in chat.requests:
                        self.trace_ids.setdefault(arm, []).append(await self._send(client, arm, request, salt, {}))
                        self.progress(arm)

            with self.tracer.start_as_current_span(
                a.BLOCK_SPAN,
                attributes={
                    a.SCENARIO: self.settings.scenario,
                    a.RUN_ID: self.run_id,
                    a.ARM: arm,
                    a.BLOCK: block,
                    a.BLOCK_REQUESTS: sum(len(chat.requests) for chat in chats),
                    a.REQUEST_MODEL: self.settings.model,
                    **cast("dict[str, AttributeValue]", self.settings.arm_facts.get(arm, {})),
                },
            ) as span:
                before = await self._counters(metrics)
                begun = time.monotonic()
                async with asyncio.TaskGroup() as group:
                    for chat in chats:
                        group.create_task(talk(chat))
                after = await self._counters(metrics)
                names = list(self.settings.servers)
                span.set_attribute(a.BLOCK_SERVERS, names)
                if self.settings.roles:
                    span.set_attribute(a.BLOCK_ROLES, [self.settings.roles[n] for n in names])
                span.set_attribute(a.BLOCK_HITS, [after[n].hits - before[n].hits for n in names])
                span.set_attribute(a.BLOCK_QUERIES, [after[n].queries - before[n].queries for n in names])
                if sizes := [c.kv_block_size for c in after.values() if c.kv_block_size]:
                    span.set_attribute(a.KV_BLOCK_SIZE, max(sizes))

    async def _counters(self, client: httpx.AsyncClient) -> dict[str, ServerCounters]:
        async def read(name: str, url: str) -> ServerCounters:
            try:
                response = await client.get(f"{url}/metrics", timeout=METRICS_TIMEOUT_S)
                response.raise_for_status()
            except httpx.HTTPError as error:
                raise UserError(
                    f"{name} does not give its metrics at {url}/metrics ({error}); see `llmtrace status`"
                ) from None
            return server_counters(response.text)

        servers = self.settings.servers
        found = await asyncio.gather(*(read(name, url) for name, url in servers.items()))
        return dict(zip(servers, found, strict=True))

    async def _send(self, client: AsyncOpenAI, arm: str, request: Request, salt: str, extra: Mapping[str, bool]) -> str:
        """Send one request and record its span. A failure is recorded on the span and counted, not raised."""
        model = self.settings.model + request.model_suffix
        span = self.tracer.start_span(
            f"chat {model}",
            context=Context(),  # a root: the block's span is no part of the request's trace
            kind=SpanKind.CLIENT,
            attributes={
                a.OPERATION: "chat",
                a.REQUEST_MODEL: model,
                a.SCENARIO: self.settings.scenario,
                a.RUN_ID: self.run_id,
                a.ARM: arm,
                a.PAIR_ID: request.pair_id,
                a.BLOCK: request.block,
                a.TENANT: request.tenant,
                a.CONVERSATION: request.conversation,
                a.TURN: request.turn,
                **extra,
            },
        )
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                await self._stream(client, request, salt, span)
        except (OpenAIError, httpx2.HTTPError, TimeoutError, ValueError) as error:
            reason = type(error).__name__
            span.set_attribute(a.ERROR_TYPE, reason)
            span.set_status(StatusCode.ERROR, reason)
            # What the server said goes to the person only: it may quote the request.
            said = " ".join(str(error).split())[:MOST_SAID]
            self.failures.append(f"{reason} ({said})" if said else reason)
        finally:
            span.end()
        return f"{span.get_span_context().trace_id:032x}"

    async def _stream(self, client: AsyncOpenAI, request: Request, salt: str, span: Span) -> None:
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))
        sent = time.perf_counter()
        stream = await client.chat.completions.create(
            model=self.settings.model + request.model_suffix,
            messages=cast("list[ChatCompletionMessageParam]", list(request.messages)),
            max_tokens=self.settings.max_tokens,
            temperature=0,
            seed=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_salt": salt},
            extra_headers=headers,
        )
        first = None
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter()
                span.add_event(a.FIRST_TOKEN)
                span.set_attribute(a.CLIENT_TTFT, (first - sent) * 1e3)
            if chunk.usage is not None:
                _set_usage(span, chunk.usage)
        span.set_attribute(a.CLIENT_E2E, (time.perf_counter() - sent) * 1e3)
        if first is None:
            span.set_attribute(a.ERROR_TYPE, "no_token")
            span.set_status(StatusCode.ERROR, "the stream ended without a token")
            self.failures.append("a stream without a token")


def _set_usage(span: Span, usage: CompletionUsage) -> None:
    span.set_attribute(a.INPUT_TOKENS, usage.prompt_tokens)
    span.set_attribute(a.OUTPUT_TOKENS, usage.completion_tokens)
    if usage.prompt_tokens_details is not None:
        span.set_attribute(a.CACHED_TOKENS, usage.prompt_tokens_details.cached_tokens or 0)


@dataclass(frozen=True)
class ServerCounters:
    """vLLM's own prefix cache counters, in tokens, and its KV block size where it tells it."""

    hits: int
    queries: int
    kv_block_size: int | None


def server_counters(exposition: str) -> ServerCounters:
    """Read vLLM's counters, summed over its engines, from its Prometheus exposition."""
    totals = {"vllm:prefix_cache_hits_total": 0.0, "vllm:prefix_cache_queries_total": 0.0}
    block_size = None
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
            elif sample.name == "vllm:cache_config_info":
                size = sample.labels.get("block_size", "")
                block_size = int(size) if size.isdigit() else None
    hits, queries = totals.values()
    return ServerCounters(int(hits), int(queries), block_size)
