"""Subscriptions against a real publisher on loopback, with the frames that vLLM sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
import zmq.asyncio
from kv_publisher import CLEARED, TOPIC, Publisher, frames, payload, removed, stored
from picking import Handle, endpoint

from llmtrace.picker import kv_subscription
from llmtrace.picker.endpoints import Endpoint, Pool
from llmtrace.picker.kv_events import Message
from llmtrace.picker.kv_subscription import Source, Subscriptions

SERVER = "default/vllm-0"
WAIT_S = 10.0


async def until(condition: Callable[[], Any], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - it stands for all kinds of conditions
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"waited {WAIT_S} s for {what}")


class Sink:
    """Keeps the sequence numbers that it is given, and fails at those in ``fails``."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | str]] = []
        self.fails: set[int] = set()

    def apply(self, server: str, message: Message) -> None:
        if message.sequence in self.fails:
            raise ZeroDivisionError
        self.told.append((server, message.sequence))

    def forget(self, server: str) -> None:
        self.told.append((server, "forgotten"))

    @property
    def numbers(self) -> list[int | str]:
        return [number for _, number in self.told]


class Following:
    """Subscriptions to a pool whose endpoints publish where their labels say."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.sink = Sink()
        self.subscriptions = Subscriptions(
            self.handle.pool, self._source, "kv@", self.sink, self.handle.metrics.kv_cache
        )

    @property
    def pool(self) -> Pool:
        return self.handle.pool

    def serve(self, *labels: dict[str, str]) -> None:
        """Make these the pool's endpoints."""
        servers = []
        for number, label in enumerate(labels):
            server = endpoint(number)
            server.labels = label
            servers.append(server)
        self.pool.replace(servers)

    def value(self, name: str, **labels: str) -> float | None:
        return self.handle.metrics.registry.get_sample_value(name, labels)

    def count(self, name: str) -> float | None:
        return self.value(name, pod_identifier=SERVER)

    @staticmethod
    def _source(server: Endpoint) -> Source | None:
        at = server.labels.get("at")
        return None if at is None else Source(server.id, at, server.labels.get("replay", ""))


MISSED = "llmtrace_kv_cache_events_missed_total"
DROPPED = "llmtrace_kv_cache_events_dropped_total"
RECEIVED = "llm_d_epp_kv_cache_events_messages_received_total"


def at(publisher: Publisher, *, replay: bool = False) -> dict[str, str]:
    labels = {"at": f"tcp://127.0.0.1:{publisher.port}"}
    return {**labels, "replay": f"tcp://127.0.0.1:{publisher.replay_port}"} if replay else labels


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


@asynccontextmanager
async def following() -> AsyncIterator[Following]:
    follower = Following()
    task = asyncio.create_task(follower.subscriptions.run())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def publishing(context: zmq.asyncio.Context, *args: int, kept: int = 1000) -> AsyncIterator[Publisher]:
    publisher = Publisher(context, *args, kept=kept)
    try:
        yield publisher
    finally:
        await publisher.close()


async def test_events_come_in_their_order(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher))
        await publisher.subscribed()
        for number in range(200):
            await publisher.publish(stored([number], [number]))
        await until(lambda: len(follower.sink.told) == 200, "all messages")
        assert follower.sink.numbers == list(range(200))
        assert (follower.count(RECEIVED), follower.count(MISSED), follower.count(DROPPED)) == (200, 0, 0)


def test_it_runs_on_the_pickers_loop() -> None:
    async def follow() -> None:
        with zmq.asyncio.Context() as context:
            await test_events_come_in_their_order(context)

    uvloop.run(follow())


async def test_other_topics_are_not_for_us(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher))
        await publisher.subscribed()
        await publisher.send(*frames(0, CLEARED, topic=b"other"))
        await publisher.publish(CLEARED)
        await until(lambda: follower.sink.told, "a message")
        assert follower.count(RECEIVED) == 1


async def test_a_gap_is_counted(context: zmq.asyncio.Context, caplog: pytest.LogCaptureFixture) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher))
        await publisher.subscribed()
        for number in range(8):
            await publisher.publish(CLEARED, lost=number in (2, 3, 6))
        await until(lambda: 7 in follower.sink.numbers, "the last message")
        assert follower.sink.numbers == [0, 1, 4, 5, 7]
        assert follower.count(MISSED) == 3
    assert caplog.text.count("were missed") == 1, "it is said once"


async def test_a_gap_is_filled_by_a_replay(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher, replay=True))
        await publisher.subscribed()
        await until(lambda: publisher.replays == [0], "the replay at the start")
        for number in range(8):
            await publisher.publish(stored([number], [number]), lost=number in (2, 3, 6))
        await until(lambda: 7 in follower.sink.numbers, "the last message")
        assert follower.sink.numbers == list(range(8))
        assert follower.count(MISSED) == 0
        assert publisher.replays[:2] == [0, 2]


async def test_what_came_before_is_replayed(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as publisher, following() as follower:
        for _ in range(5):
            await publisher.publish(CLEARED)
        follower.serve(at(publisher, replay=True))
        await until(lambda: len(follower.sink.told) == 5, "the replay")
        await publisher.subscribed()
        await publisher.publish(CLEARED)
        await until(lambda: len(follower.sink.told) == 6, "a message")
        assert follower.sink.numbers == list(range(6))


async def test_what_is_too_old_for_a_replay_is_counted(context: zmq.asyncio.Context) -> None:
    async with publishing(context, kept=3) as publisher, following() as follower:
        for _ in range(10):
            await publisher.publish(CLEARED)
        follower.serve(at(publisher, replay=True))
        await until(lambda: 9 in follower.sink.numbers, "the replay")
        assert follower.sink.numbers == [7, 8, 9]
        assert follower.count(MISSED) == 7


async def test_a_server_that_starts_again_is_forgotten(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as first, following() as follower:
        follower.serve(at(first))
        await first.subscribed()
        for _ in range(3):
            await first.publish(CLEARED)
        await until(lambda: len(follower.sink.told) == 3, "three messages")
        await first.close()
        async with publishing(context, first.port) as second:
            await second.subscribed()
            for _ in range(2):
                await second.publish(CLEARED)
            await until(lambda: len(follower.sink.told) == 6, "the new server's messages")
            assert follower.sink.numbers == [0, 1, 2, "forgotten", 0, 1]
            assert follower.count(MISSED) == 0


async def test_a_server_that_starts_again_is_replayed(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as first, following() as follower:
        follower.serve(at(first, replay=True))
        await first.subscribed()
        for _ in range(9):
            await first.publish(CLEARED)
        await until(lambda: len(follower.sink.told) == 9, "nine messages")
        await first.close()
        async with publishing(context, first.port, first.replay_port) as second:
            await second.subscribed()
            for number in range(4):
                await second.publish(CLEARED, lost=number < 2)
            await until(lambda: 3 in follower.sink.numbers[9:], "the new server's messages")
            assert follower.sink.numbers[9:] == ["forgotten", 0, 1, 2, 3]
            assert follower.count(MISSED) == 0


async def test_a_replay_that_does_not_come_is_not_waited_for_again(
    context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_subscription, "REPLAY_IDLE_S", 0.1)
    async with publishing(context) as publisher, following() as follower:
        silent = context.socket(zmq.ROUTER)
        silent.bind("tcp://127.0.0.1:*")
        follower.serve({**at(publisher), "replay": silent.last_endpoint.decode()})
        await publisher.subscribed()
        for number in range(8):
            await publisher.publish(CLEARED, lost=number in (2, 5))
        await until(lambda: 7 in follower.sink.numbers, "the last message")
        assert follower.sink.numbers == [0, 1, 3, 4, 6, 7]
        assert follower.count(MISSED) == 2
        errors = "llm_d_epp_kv_cache_events_zmq_errors_total"
        assert follower.value(errors, pod_identifier=SERVER, operation="replay") == 1
        silent.close(linger=0)
    assert caplog.text.count("no replay") == 1


async def test_a_message_that_comes_twice_counts_once(context: zmq.asyncio.Context) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher))
        await publisher.subscribed()
        for number in (0, 1, 1, 2):
            await publisher.send(*frames(number, CLEARED))
        await until(lambda: 2 in follower.sink.numbers, "the last message")
        assert follower.sink.numbers == [0, 1, 2]


async def test_bad_messages_are_dropped_and_said_once(
    context: zmq.asyncio.Context, caplog: pytest.LogCaptureFixture
) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.serve(at(publisher))
        await publisher.subscribed()
        for raw in ([TOPIC], [TOPIC, b"\0" * 8, b"\xc1"], [TOPIC, b"\0" * 7, payload()], [TOPIC] * 5):
            await publisher.send(*raw)
        await publisher.publish(CLEARED)
        await until(lambda: follower.sink.told, "the good message")
        assert (follower.count(DROPPED), follower.count(RECEIVED)) == (4, 5)
    assert caplog.text.count("is dropped") == 1


async def test_a_fault_in_the_index_ends_nothing(
    context: zmq.asyncio.Context, caplog: pytest.LogCaptureFixture
) -> None:
    async with publishing(context) as publisher, following() as follower:
        follower.sink.fails = {1}
        follower.serve(at(publisher))
        await publisher.subscribed()
        for _ in range(3):
            await publisher.publish(removed(1))
        await until(lambda: 2 in follower.sink.numbers, "the message after it")
        assert follower.sink.numbers == [0, 2]
        assert (follower.count(DROPPED), follower.count(MISSED)) == (1, 0)
    assert "ZeroDivisionError" in caplog.text


async def test_servers_come_and_go(context: zmq.asyncio.Context, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with publishing(context) as one, publishing(context) as two, following() as follower:
        active = "llm_d_epp_kv_cache_events_active_subscribers"
        follower.serve(at(one), {})
        await one.subscribed()
        await one.publish(CLEARED)
        await until(lambda: follower.sink.told == [(SERVER, 0)], "its message")
        assert follower.value(active) == 1, "the other one does not publish"
        follower.serve(at(one), at(two))
        await two.subscribed()
        await two.publish(CLEARED)
        await until(lambda: ("default/vllm-1", 0) in follower.sink.told, "the other one's message")
        follower.serve({}, at(two))
        await until(lambda: (SERVER, "forgotten") in follower.sink.told, "the first one to be forgotten")
        assert follower.value(active) == 1
        assert follower.count(RECEIVED) is None, "its series are gone"
        follower.serve(at(two), at(two))
        await two.subscribed()
        follower.pool.replace([])
        assert follower.sink.told[-2:] == [("default/vllm-0", "forgotten"), ("default/vllm-1", "forgotten")]
        assert follower.value(active) == 0


async def test_an_address_that_zmq_refuses_is_tried_again(
    context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_subscription, "RECONCILE_S", 0.01)
    async with publishing(context) as publisher, following() as follower:
        follower.serve({"at": "nonsense"})
        await until(lambda: caplog.text.count("the subscription to nonsense ended") >= 2, "two attempts")
        follower.serve(at(publisher))
        await publisher.subscribed()
