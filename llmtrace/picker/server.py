"""The picker as a server: ext_proc and health by gRPC, metrics by HTTP."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from llmtrace.errors import UserError
from llmtrace.picker import config, ext_proc
from llmtrace.picker.endpoints import Pool
from llmtrace.picker.exchange import Exchange, Services
from llmtrace.picker.flow_control import FlowControl
from llmtrace.picker.metrics import Metrics
from llmtrace.picker.scheduler import Scheduler
from llmtrace.picker.scrape import Scraper
from llmtrace.spans import Tracer

CANCELLATION_S = 0.02
GRACE_S = 5.0
"""How long running exchanges may go on after the order to stop."""
MAX_MESSAGE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Where the picker listens and what it reads. Ports of 0 take a free one; intervals in seconds."""

    pool_name: str
    pool_namespace: str
    config_file: Path
    bind_address: str
    grpc_port: int
    health_port: int
    metrics_port: int
    refresh_interval_s: float


class PickerServer:
    """A picker from its configuration to its ports."""

    def __init__(self, options: Options, tracer: Tracer) -> None:
        self.pool = Pool(options.pool_name, options.pool_namespace)
        self.metrics = Metrics(self.pool)
        self.tracer = tracer
        self._options = options
        self._configuration = config.load(options.config_file, self)
        scheduler = Scheduler(self._configuration, self.metrics, tracer)
        flow = self._configuration.flow_control
        self._flow_control = FlowControl(flow, self.pool, self.metrics) if flow else None
        self._services = Services.make(self.pool, scheduler, self.metrics, tracer, self._flow_control)
        self._scraper = Scraper(self.pool, options.refresh_interval_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; raises UserError where the start fails."""
        self._check_ports()
        self._configuration.discovery.load()
        await self._scraper.once(self.pool)
        server, port = self._ext_proc_server()
        health_server, health_servicer = self._health_server()
        metrics_server = self._metrics_server()
        await server.start()
        await health_server.start()
        _log.info("picking among %d endpoints on %s:%d", len(self.pool), self._options.bind_address, port)
        await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        await health_servicer.set(ext_proc.SERVICE, health_pb2.HealthCheckResponse.SERVING)
        tasks: list[asyncio.Task[None]] = [
            asyncio.create_task(self._scraper.run()),
            asyncio.create_task(self._configuration.discovery.watch()),
            *(asyncio.create_task(plugin.run()) for plugin in self._configuration.plugins),
            *([asyncio.create_task(self._flow_control.run())] if self._flow_control else []),
        ]
        try:
            stopped = asyncio.create_task(stop.wait())
            waiting: set[asyncio.Task[object]] = {stopped, *tasks}
            while stopped in waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    # A fault in the scrapes or in discovery ends the picker: it would go on with what it once knew.
                    task.result()
        finally:
            await health_servicer.enter_graceful_shutdown()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.stop(GRACE_S)
            await health_server.stop(None)
            metrics_server.shutdown()

    async def process(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """ExternalProcessor.Process: one HTTP exchange."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        exchange = Exchange(self._services, metadata)
        cancelled = False
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                for response in await exchange.handle(message):
                    await context.write(response)
                if exchange.answered:
                    return
            if not exchange.complete:
                # A cancelled stream first reads as ended; the cancellation comes a moment later.
                await asyncio.sleep(CANCELLATION_S)
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            exchange.close(cancelled=cancelled)

    def _check_ports(self) -> None:
        """Refuse taken ports before anything is started."""
        options = self._options
        ports = {
            "--grpc-port": options.grpc_port,
            "--grpc-health-port": options.health_port,
            "--metrics-port": options.metrics_port,
        }
        for flag, port in ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((options.bind_address, port))
                except OSError:
                    raise self._taken(port, flag) from None

    def _ext_proc_server(self) -> tuple[grpc.aio.Server, int]:
        handler = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=ext_proc.ProcessingRequest.FromString,
            response_serializer=ext_proc.ProcessingResponse.SerializeToString,
        )
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ]
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ext_proc.SERVICE, {"Process": handler}),))
        return server, self._bind(server, self._options.grpc_port, "--grpc-port")

    def _health_server(self) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        self._bind(server, self._options.health_port, "--grpc-health-port")
        return server, servicer

    def _bind(self, server: grpc.aio.Server, port: int, flag: str) -> int:
        try:
            bound: int = server.add_insecure_port(f"{self._options.bind_address}:{port}")
        except RuntimeError:
            raise self._taken(port, flag) from None
        return bound

    def _metrics_server(self) -> WSGIServer:
        try:
            server, _ = start_http_server(
                self._options.metrics_port, addr=self._options.bind_address, registry=self.metrics.registry
            )
        except OSError:
            raise self._taken(self._options.metrics_port, "--metrics-port") from None
        return server

    def _taken(self, port: int, flag: str) -> UserError:
        return UserError(
            f"{self._options.bind_address}:{port} cannot be listened on: stop what uses it, or change {flag}"
        )
