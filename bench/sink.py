"""An OTLP gRPC receiver in a process of its own, which counts what it is sent and keeps nothing."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
START_TIMEOUT_S = 30
MAX_MESSAGE_BYTES = 1 << 26


class Counts(NamedTuple):
    """What a receiver has taken: requests, spans in them, bytes of the messages without gRPC's framing."""

    requests: int = 0
    spans: int = 0
    bytes: int = 0

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Receiver:
    """One port of the sink."""

    port: int
    _memory: Any
    _offset: int

    def counts(self) -> Counts:
        return Counts(*self._memory[self._offset : self._offset + len(Counts._fields)])


@contextmanager
def sink(delays_s: Sequence[float] = (0.0,)) -> Iterator[list[Receiver]]:
    """One receiver for each of ``delays_s``: the time until it answers. What the sender gave up on is not counted."""
    context = multiprocessing.get_context("spawn")
    width = len(Counts._fields)
    memory = context.RawArray("q", width * len(delays_s))
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(list(delays_s), memory, there), daemon=True)
    child.start()
    there.close()
    try:
        if not here.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the sink did not say its ports within {START_TIMEOUT_S} s")
        yield [Receiver(port, memory, index * width) for index, port in enumerate(here.recv())]
    finally:
        child.terminate()
        child.join()


def _run(delays_s: list[float], memory: Any, ports: Any) -> None:
    asyncio.run(_serve(delays_s, memory, ports))


async def _serve(delays_s: list[float], memory: Any, ports: Any) -> None:
    servers = []
    bound = []
    for index, delay in enumerate(delays_s):
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        handler = grpc.unary_unary_rpc_method_handler(_export(delay, memory, index * len(Counts._fields)))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        bound.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    ports.send(bound)
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


def _export(delay_s: float, memory: Any, offset: int) -> Any:
    async def export(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if delay_s:
            await asyncio.sleep(delay_s)
        message = ExportTraceServiceRequest.FromString(request)
        spans = sum(len(scope.spans) for resource in message.resource_spans for scope in resource.scope_spans)
        for index, value in enumerate(Counts(1, spans, len(request))):
            memory[offset + index] += value
        return b""

    return export
