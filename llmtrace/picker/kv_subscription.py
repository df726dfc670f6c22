"""Subscriptions to the KV cache events of the pool's servers, over ZMQ.

Sequence numbers tell what was missed: a gap is filled by a replay where the server offers one, and what is missing
still is counted. A number that starts over tells that the server did, with an empty cache.
Source: llm-d-router, pkg/kvevents; vLLM 0.32, ZmqEventPublisher.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import zmq
import zmq.asyncio

from llmtrace.picker.endpoints import Endpoint, Pool
from llmtrace.picker.kv_events import END_OF_REPLAY, SEQUENCE_BYTES, Message, MessageError, parse
from llmtrace.picker.metrics import KVCacheMetrics

RECONCILE_S = 0.5
"""How often it is looked at which servers there are."""
REPLAY_IDLE_S = 2.0
"""A replay that sends nothing for this long has failed."""
REPLAY_COOLDOWN_S = 30.0
"""After a failed replay no other one is asked for, for this long."""
HEARTBEAT_MS = 10_000
MAX_QUEUED_MESSAGES = 10_000
MAX_MESSAGE_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a server publishes. ``endpoint`` is its id, ``replay`` the address of its replays, if it has any."""

    endpoint: str
    address: str
    replay: str = ""


class Sink(Protocol):
    """Takes what subscriptions find out."""

    def apply(self, endpoint: str, message: Message) -> None:
        """A server's events, in their order."""

    def forget(self, endpoint: str) -> None:
        """The server started again, or is gone: what it told is no longer true."""


class Subscription:
    """The events of one server."""

    def __init__(self, source: Source, topic: str, sink: Sink, metrics: KVCacheMetrics) -> None:
        self.source = source
        self._topic = topic
        self._sink = sink
        self._metrics = metrics
        self._received = metrics.received.labels(source.endpoint)
        self._missed = metrics.missed.labels(source.endpoint)
        self._dropped = metrics.dropped.labels(source.endpoint)
        self._live = -1
        self._applied = -1
        self._no_replay_before = 0.0
        self._complaints: set[str] = set()

    async def run(self, context: zmq.asyncio.Context) -> None:
        """Follow the events until cancelled. ZMQ connects again by itself."""
        with _socket(context, zmq.SUB) as socket:
            socket.subscribe(self._topic)
            socket.connect(self.source.address)
            await self._replay(context)
            while True:
                frames = await socket.recv_multipart()
                self._received.inc()
                message = self._parse(frames)
                if message is not None:
                    await self._take(message, context)
                # Messages that are there already are received without a pause; requests come first.
                await asyncio.sleep(0)

    async def _take(self, message: Message, context: zmq.asyncio.Context) -> None:
        """A message as it was published."""
        sequence = message.sequence
        if sequence < self._live:
            _log.info("endpoint %s started again: its KV cache is empty", self.source.endpoint)
            self._sink.forget(self.source.endpoint)
            self._applied = -1
            self._no_replay_before = 0.0
        self._live = sequence
        if sequence > self._applied + 1:
            await self._replay(context)
        self._apply(message)

    def _apply(self, message: Message) -> None:
        """The next message, unless a replay brought it already."""
        missed = message.sequence - self._applied - 1
        if missed < 0:
            return
        if missed:
            self._missed.inc(missed)
            self._complain("gap", "endpoint %s: %d messages about its KV cache were missed", missed)
        self._applied = message.sequence
        try:
            self._sink.apply(self.source.endpoint, message)
        except Exception:
            # A fault in the index must not end what keeps it up to date.
            self._dropped.inc()
            _log.exception("endpoint %s: message %d was dropped", self.source.endpoint, message.sequence)

    async def _replay(self, context: zmq.asyncio.Context) -> None:
        """Ask for everything after the last message, as far as the server still has it."""
        now = time.monotonic()
        if not self.source.replay or now < self._no_replay_before:
            return
        with _socket(context, zmq.DEALER) as socket:
            socket.connect(self.source.replay)
            await socket.send_multipart([b"", (self._applied + 1).to_bytes(SEQUENCE_BYTES, "big")])
            try:
                while True:
                    async with asyncio.timeout(REPLAY_IDLE_S):
                        frames = await socket.recv_multipart()
                    # An empty frame ends the envelope.
                    if frames[-2:] == [END_OF_REPLAY, b""]:
                        return
                    message = self._parse(frames[1:])
                    if message is not None:
                        self._apply(message)
                    await asyncio.sleep(0)
            except TimeoutError:
                self._no_replay_before = time.monotonic() + REPLAY_COOLDOWN_S
                self._metrics.errors.labels(self.source.endpoint, "replay").inc()
                self._complain("replay", "endpoint %s: no replay of its KV cache's events from %s", self.source.replay)

    def _parse(self, frames: Sequence[bytes]) -> Message | None:
        try:
            return parse(frames)
        except MessageError as error:
            self._dropped.inc()
            self._complain("message", "endpoint %s: a message about its KV cache is dropped: %s", error)
            return None

    def _complain(self, about: str, text: str, detail: object) -> None:
        """Say it once."""
        if about not in self._complaints:
            self._complaints.add(about)
            _log.warning(text, self.source.endpoint, detail)


class Subscriptions:
    """The subscriptions to all servers of the pool, as they come and go.

    ``source_of`` tells where an endpoint publishes; None where it does not.
    """

    def __init__(
        self,
        pool: Pool,
        source_of: Callable[[Endpoint], Source | None],
        topic: str,
        sink: Sink,
        metrics: KVCacheMetrics,
    ) -> None:
        self._pool = pool
        self._source_of = source_of
        self._topic = topic
        self._sink = sink
        self._metrics = metrics
        self._running: dict[Source, asyncio.Task[None]] = {}
        metrics.subscribers.set_function(lambda: len(self._running))
        pool.on_removal(self._removed)

    async def run(self) -> None:
        """Follow the pool until cancelled."""
        with zmq.asyncio.Context() as context:
            try:
                while True:
                    self._reconcile(context)
                    await asyncio.sleep(RECONCILE_S)
            finally:
                tasks = list(self._running.values())
                for source in list(self._running):
                    self._stop(source)
                await asyncio.gather(*tasks, return_exceptions=True)

    def _reconcile(self, context: zmq.asyncio.Context) -> None:
        wanted = {source for endpoint in self._pool if (source := self._source_of(endpoint)) is not None}
        for source, task in list(self._running.items()):
            if source not in wanted:
                self._stop(source)
            elif task.done() and (error := task.exception()) is not None:
                self._metrics.errors.labels(source.endpoint, "subscribe").inc()
                _log.error("endpoint %s: the subscription to %s ended: %s", source.endpoint, source.address, error)
                self._stop(source)
        for source in wanted - self._running.keys():
            subscription = Subscription(source, self._topic, self._sink, self._metrics)
            self._running[source] = asyncio.create_task(subscription.run(context))

    def _removed(self, endpoint: str) -> None:
        for source in [source for source in self._running if source.endpoint == endpoint]:
            self._stop(source)

    def _stop(self, source: Source) -> None:
        self._running.pop(source).cancel()
        self._sink.forget(source.endpoint)
        self._metrics.forget(source.endpoint)


def _socket(context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvhwm = MAX_QUEUED_MESSAGES
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.heartbeat_ivl = HEARTBEAT_MS
    return socket
