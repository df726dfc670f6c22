"""The sidecar as an ASGI application: requests go on to the decode server, after a prefill leg where one is asked for.

Source: llm-d-router, pkg/sidecar/proxy: proxy.go, chat_completions.go, data_parallel.go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from opentelemetry.trace import SpanKind

from llmtrace.semconv import attributes as a
from llmtrace.sidecar.body import APIS, Api, parse
from llmtrace.sidecar.exchange import Answer, Exchange, Message, Receive, RefusedError, Send, error
from llmtrace.sidecar.spans import fail, failing
from llmtrace.sidecar.split import CONNECTOR, Retries, Split
from llmtrace.sidecar.upstream import Caller, Request, Server, address, request_headers
from llmtrace.spans import Span, Tracer, remote_parent

SCOPE = "llm-d-router/pkg/sidecar/proxy"
ROUTING_HEADERS = frozenset(header.encode() for header in (a.PREFILLER_HEADER, a.ENCODERS_HEADER, a.KV_SOURCE_HEADER))
"""Headers for the sidecar, which no model server is sent with an inference request."""
DENIED = "SSRF protection: prefill target not in allowlist"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What the proxies of all ranks share.

    ``prefill`` makes the server of an address. ``allowed`` tells the addresses that a request may name; None, that it
    may name any. ``choose`` takes one of several candidates. ``untraced`` records nothing.
    """

    caller: Caller
    tracer: Tracer
    untraced: Tracer
    retries: Retries
    prefill: Callable[[str], Server]
    allowed: Callable[[], Collection[str] | None]
    choose: Callable[[list[str]], str]


class Proxy:
    """The sidecar in front of one decode server.

    ``ranks`` are the decode servers that a request may choose by x-data-parallel-host-port; None ignores the header.
    """

    def __init__(self, services: Services, decode: Server, ranks: Mapping[str, Server] | None = None) -> None:
        self._services = services
        self._decode = decode
        self._ranks = ranks
        self._scoped = services.tracer.scoped(SCOPE)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = Exchange(scope, receive, send)
        started = perf_counter()
        method, path = scope["method"], scope["path"]
        api = APIS.get(path) if method == "POST" else None
        parent = remote_parent(exchange.headers)
        # Scrapes and health checks come without a context, and would be traces of their own.
        tracer = self._services.tracer if parent or api else self._services.untraced
        span = tracer.start(f"{a.SIDECAR_SPAN_PREFIX}{method} {path}", parent, SpanKind.SERVER)
        if api is None:
            await exchange.run(span, partial(self._pass_on, exchange, span))
        else:
            forward = span.child(a.FORWARD_SPAN, SpanKind.SERVER, self._scoped)
            await exchange.run(span, partial(self._infer, exchange, forward, api, started))

    async def _pass_on(self, exchange: Exchange, span: Span, body: bytes) -> None:
        """A request of any other kind."""
        if exchange.scope["path"] == "/health" and exchange.scope["method"] in ("GET", "HEAD"):
            await exchange.answer(Answer(200, [], b""))
            return
        request = _request(exchange, frozenset())
        await exchange.pass_on(self._services.caller, self._decode, request, body, span)

    async def _infer(self, exchange: Exchange, span: Span, api: Api, started: float, body: bytes) -> None:
        """An inference request; ``span`` is its own below that of the request, and ends."""
        with failing(span, least=500):
            candidates = _candidates(exchange)
            target = self._services.choose(candidates).strip()
            span.attributes = {
                a.PROXY_CONNECTOR: CONNECTOR,
                a.PROXY_KV_CONNECTOR: CONNECTOR,
                a.PROXY_EC_CONNECTOR: "",
                a.PROXY_REQUEST_PATH: exchange.scope["path"],
                a.PROXY_API: api.name,
                a.PD_SPLIT: bool(target),
            }
            request = _request(exchange, ROUTING_HEADERS)
            caller = self._services.caller
            if target:
                span.attributes |= {a.PROXY_PREFILL_TARGET: target, a.PROXY_PREFILL_CANDIDATES: len(candidates)}
                prefill = self._prefill_server(target, span)
                content = _parsed(body)
                decode, data_parallel = self._decode_server(exchange)
                split = Split(caller, self._services.retries, exchange, request, span, started)
                await split.run(content, api, prefill, target, decode, data_parallel=data_parallel)
            else:
                span.attributes[a.PROXY_REASON] = "no_prefill_header"
                decode, _ = self._decode_server(exchange)
                await exchange.pass_on(caller, decode, request, body, span)
            if exchange.status >= 500:
                fail(span, str(exchange.status), "")

    def _prefill_server(self, target: str, span: Span) -> Server:
        """The prefill server that the request names; raises RefusedError where it may not, or is none."""
        try:
            found = address(target)
        except ValueError as wrong:
            raise RefusedError(error(502, "BadGateway", f"{a.PREFILLER_HEADER}: {wrong}"), str(wrong)) from None
        allowed = self._services.allowed()
        if allowed is not None and found not in allowed:
            _log.warning("the prefill server %s is not in the endpoints file", found)
            span.attributes |= {a.PROXY_ERROR: "ssrf_protection_denied", a.PROXY_DENIED_TARGET: target}
            fail(span, "403", DENIED)
            text = b"Forbidden: prefill target not allowed by SSRF protection\n"
            raise RefusedError(Answer(403, [(b"content-type", b"text/plain; charset=utf-8")], text))
        return self._services.prefill(found)

    def _decode_server(self, exchange: Exchange) -> tuple[Server, bool]:
        """The decode server, and whether the request chose it by its rank."""
        rank = exchange.headers.get(a.DATA_PARALLEL_HEADER)
        if not rank or self._ranks is None:
            return self._decode, False
        if rank not in self._ranks:
            raise RefusedError(Answer(400, [], b""), f"{a.DATA_PARALLEL_HEADER} names no rank")
        return self._ranks[rank], True


def _candidates(exchange: Exchange) -> list[str]:
    """The prefill servers that the request names: several headers, or one with commas; an empty one where none is."""
    header = a.PREFILLER_HEADER.encode()
    values = [value.decode("latin-1") for name, value in exchange.scope["headers"] if name == header]
    return values if len(values) > 1 else (values or [""])[0].split(",")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        return parse(body)
    except ValueError as wrong:
        raise RefusedError(error(400, "BadRequestError", f"invalid JSON: {wrong}")) from None


def _request(exchange: Exchange, dropped: frozenset[bytes]) -> Request:
    """What goes on to a model server, without the headers ``dropped``."""
    scope = exchange.scope
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    if not path.startswith("/"):
        raise RefusedError(error(400, "BadRequestError", "the target of the request is no path"))
    headers = request_headers(scope["headers"], (scope.get("client") or ("", 0))[0], dropped)
    return Request(scope["method"], f"{path}?{query}" if query else path, headers)
