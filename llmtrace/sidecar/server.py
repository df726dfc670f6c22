"""The sidecar as a server: one port for each data-parallel rank, each in front of its model server."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter

import uvicorn

from llmtrace.endpoints_file import EndpointEntry, EndpointsFile
from llmtrace.flags import listen
from llmtrace.sidecar.config import Config
from llmtrace.sidecar.proxy import Proxy, Services
from llmtrace.sidecar.split import Retries
from llmtrace.sidecar.tls import ServerTls, client_context
from llmtrace.sidecar.upstream import Caller, Server
from llmtrace.spans import Tracer
from llmtrace.telemetry import Tracing

SCOPE = "llmtrace.sidecar"
KEEP_IDLE_S = 300
"""How long a caller's connection may be idle, as in llm-d's sidecar."""
GRACE_S = 60
"""How long running requests may go on after the order to stop, as in llm-d's sidecar."""

_log = logging.getLogger(__name__)


class SidecarServer:
    """A sidecar from its configuration to its ports; raises UserError where it cannot start."""

    def __init__(self, config: Config, tracing: Tracing) -> None:
        self._config = config
        self._tracer = Tracer(tracing.provider, tracing.processor, SCOPE)
        self._untraced = Tracer(tracing.provider, None, SCOPE)
        self._tls = ServerTls(config.cert_path) if config.secure_proxy else None
        self._prefill_tls, self._decode_tls = (
            client_context(verify=stage not in config.tls_insecure_skip_verify) if stage in config.enable_tls else None
            for stage in ("prefiller", "decoder")
        )
        self._allowed: frozenset[str] | None = None
        self._endpoints = EndpointsFile(config.endpoints_file, self._allow) if config.endpoints_file else None
        if self._endpoints is not None:
            self._endpoints.load()
        ranks = range(config.data_parallel_size)
        self._sockets = [listen(config.bind_address, config.port + rank, "--bind-address") for rank in ranks]
        self._decode = [
            Server(f"localhost:{config.model_server_port + rank}", config.decode_idle_timeout_s, self._decode_tls)
            for rank in ranks
        ]

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then until the running requests are over."""
        caller = Caller(self._tracer, self._config.connect_timeout_s)
        servers = [_Server(self._uvicorn(proxy)) for proxy in self._proxies(caller)]
        watches = [asyncio.create_task(each.watch()) for each in (self._endpoints, self._tls) if each is not None]
        serving = [
            asyncio.create_task(server.serve([sock])) for server, sock in zip(servers, self._sockets, strict=True)
        ]
        for sock, decode in zip(self._sockets, self._decode, strict=True):
            scheme, (host, port) = "https" if self._tls else "http", sock.getsockname()[:2]
            _log.info("%s://%s:%d in front of %s", scheme, host, port, decode.base)
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({stopped, *watches, *serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # A fault of a watch ends the sidecar: it would go on with what it once knew.
                task.result()
        finally:
            stopped.cancel()
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*serving, return_exceptions=True)
            for watch in watches:
                watch.cancel()
            await caller.close()

    def _proxies(self, caller: Caller) -> list[Proxy]:
        config = self._config
        services = Services(
            caller=caller,
            tracer=self._tracer,
            untraced=self._untraced,
            retries=Retries(config.prefill_max_retries, config.prefill_retry_backoff_s),
            prefill=lambda address: Server(address, config.prefill_idle_timeout_s, self._prefill_tls),
            allowed=lambda: self._allowed,
            choose=random.choice if config.prefiller_sampling else itemgetter(0),
        )
        ranks = {f"{config.pod_ip}:{config.port + rank}": server for rank, server in enumerate(self._decode)}
        # As in llm-d's, only the first rank's port passes requests on to the others.
        return [Proxy(services, server, None if rank else ranks) for rank, server in enumerate(self._decode)]

    def _uvicorn(self, proxy: Proxy) -> uvicorn.Config:
        tls = self._tls
        return uvicorn.Config(
            proxy,
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_IDLE_S,
            timeout_graceful_shutdown=GRACE_S,
            ssl_context_factory=None if tls is None else lambda *_: tls.context,
        )

    def _allow(self, entries: list[EndpointEntry]) -> None:
        self._allowed = frozenset(f"{entry.address}:{entry.port}" for entry in entries)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process, which may have several servers."""
        yield
