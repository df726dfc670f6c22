"""Calls to model servers: kept connections, limits in time, trace context, and the headers that a proxy passes on."""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
from multidict import CIMultiDict
from opentelemetry.trace import SpanKind
from yarl import URL

from llmtrace.semconv import attributes as a
from llmtrace.sidecar.spans import RequestError, call_attributes, fail, failing
from llmtrace.spans import Span, Tracer, traceparent

KEEP_IDLE_S = 4.0
"""Less than the 5 s after which vLLM closes a connection, so that no request meets one that is about to go."""
HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
"""Headers of one connection (RFC 9110, 7.6.1), which a proxy does not pass on."""
_NOT_SENT = HOP_BY_HOP | {b"content-length", b"expect", b"x-forwarded-for"}
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")

Headers = list[tuple[bytes, bytes]]


class CallError(RequestError):
    """A server did not answer, or not to the end; ``status`` is that of a gateway which says so: 502, 503 or 504."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.status = status


@dataclass(frozen=True)
class Server:
    """A model server: host and port, whether and how it is called by TLS, and how long it may send nothing."""

    address: str
    idle_timeout_s: float
    tls: ssl.SSLContext | None = None

    @property
    def base(self) -> str:
        """The URL of its root, without the slash."""
        return f"{'https' if self.tls else 'http'}://{self.address}"


class Request(NamedTuple):
    """What both legs of a request send alike; ``target`` is path and query as they came."""

    method: str
    target: str
    headers: CIMultiDict[str]


class Response:
    """A response whose body is still to come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Headers = passed_on(response.raw_headers, HOP_BY_HOP)
        self.content_type = response.headers.get("content-type", "")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the parts in which it arrives."""
        while chunk := await self._response.content.readany():
            yield chunk

    async def read(self) -> bytes:
        """The whole body."""
        return await self._response.read()


class Caller:
    """Calls servers. Close it at the end."""

    def __init__(self, tracer: Tracer, connect_timeout_s: float) -> None:
        self._tracer = tracer
        self._connect_timeout_s = connect_timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_IDLE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def call(self, server: Server, request: Request, body: bytes, above: Span) -> AsyncIterator[Response]:
        """Send a request; the span of the call, below ``above``, ends with the block.

        Raises CallError, also within the block where the body breaks off.
        """
        url = server.base + request.target
        span = above.child(a.HTTP_SPAN_PREFIX + request.method, SpanKind.CLIENT, self._tracer)
        headers = request.headers
        if span.recording:
            span.attributes = call_attributes(request.method, url)
            headers = headers.copy()
            headers["traceparent"] = traceparent(span.context)
        with failing(span):
            async with self._request(request.method, url, headers, body, server) as response:
                span.attributes[a.HTTP_STATUS] = response.status
                if response.status >= 400:
                    fail(span, str(response.status), "")
                yield Response(response)

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, headers: CIMultiDict[str], body: bytes, server: Server
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s, sock_read=server.idle_timeout_s)
        try:
            # aiohttp's own limits leave out a body that the server does not take.
            async with (
                asyncio.timeout(self._connect_timeout_s + server.idle_timeout_s) as limit,
                self._session.request(
                    method,
                    URL(url, encoded=True),
                    headers=headers,
                    data=body or None,
                    ssl=server.tls or True,
                    timeout=timeout,
                    allow_redirects=False,
                ) as response,
            ):
                limit.reschedule(None)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _failed(error, server, self._connect_timeout_s) from error


def passed_on(headers: Iterable[tuple[bytes, bytes]], without: frozenset[bytes]) -> Headers:
    """The headers, names in lower case, without those named and without those that their Connection header names."""
    found = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in found if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in found if name not in without and name not in named]


def request_headers(headers: Headers, client: str, dropped: frozenset[bytes]) -> CIMultiDict[str]:
    """The headers of a request as they go on: as they came, without ``dropped`` ones and those of the connection.

    ``client`` is the address that joins x-forwarded-for.
    """
    kept = passed_on(headers, _NOT_SENT | dropped)
    found = CIMultiDict((name.decode("latin-1"), _text(value)) for name, value in kept)
    forwarded = [_text(value) for name, value in headers if name == b"x-forwarded-for"]
    found["x-forwarded-for"] = ", ".join([*forwarded, client])
    return found


def address(text: str) -> str:
    """Host and port of a server as a header names it; raises ValueError where it names none."""
    found = text.removeprefix("http://")
    match = _ADDRESS.fullmatch(found)
    if match is None or int(match[2] or 80) > 65535:
        raise ValueError(f"{text!r} is no host and port")
    return found


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _failed(error: Exception, server: Server, connect_timeout_s: float) -> CallError:
    kind, where = type(error).__name__, server.address
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return CallError(504, kind, f"{where} took no connection within {connect_timeout_s:g} s")
    if isinstance(error, TimeoutError):
        return CallError(504, kind, f"{where} sent nothing for {server.idle_timeout_s:g} s")
    if isinstance(error, aiohttp.ClientConnectorError):
        status = 503 if error.os_error.errno == errno.ECONNREFUSED else 502
        return CallError(status, kind, f"{where} cannot be reached ({error.os_error.strerror or 'no reason known'})")
    return CallError(502, kind, f"{where} broke off")
