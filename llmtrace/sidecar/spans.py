"""Attributes of the sidecar's HTTP spans: those of OpenTelemetry's conventions that Go's otelhttp sets.

Source: opentelemetry-go-contrib, instrumentation/net/http/otelhttp, internal/semconv.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llmtrace.semconv import attributes as a
from llmtrace.spans import Attributes, Span

CANCELLED = "Cancelled"
FAULT = "a fault of the sidecar"
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_PORTS = {"http": 80, "https": 443}


def server_attributes(scope: Mapping[str, Any], headers: Mapping[str, str]) -> Attributes:
    """Attributes of the span of a request; ``scope`` is that of ASGI, ``headers`` have names in lower case."""
    scheme = scope["scheme"]
    found = _method(scope["method"]) | {
        a.URL_SCHEME: scheme,
        a.URL_PATH: scope["path"],
        a.PROTOCOL_VERSION: scope["http_version"],
        **_host(scheme, headers.get("host", "")),
    }
    peer, port = scope.get("client") or ("", 0)
    if peer:
        found |= {a.PEER_ADDRESS: peer, a.PEER_PORT: port}
    if client := headers.get("x-forwarded-for", "").partition(",")[0] or peer:
        found[a.CLIENT_ADDRESS] = client
    if agent := headers.get("user-agent"):
        found[a.USER_AGENT] = agent
    return found


def call_attributes(method: str, url: str) -> Attributes:
    """Attributes of the span of a call to a model server."""
    scheme, _, rest = url.partition("://")
    return _method(method) | {
        a.URL_FULL: url,
        a.PROTOCOL_VERSION: "1.1",
        **_host(scheme, rest.partition("/")[0]),
    }


def _method(method: str) -> Attributes:
    if method in _METHODS:
        return {a.HTTP_METHOD: method}
    return {a.HTTP_METHOD: "_OTHER", a.HTTP_METHOD_ORIGINAL: method}


def _host(scheme: str, host: str) -> Attributes:
    """Server's address, and its port where it is not the scheme's own."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or name.endswith(":"):
        name, port = host, ""
    found: Attributes = {a.SERVER_ADDRESS: name.strip("[]")}
    if port and int(port) != _PORTS.get(scheme):
        found[a.SERVER_PORT] = int(port)
    return found


class RequestError(Exception):
    """What ends a request before it is complete; ``error_type`` is a status code or the name of an exception."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


@contextmanager
def failing(span: Span, least: int = 300) -> Iterator[Span]:
    """End the span with the block, with an error where that fails, with a status from ``least`` on, or is cancelled."""
    try:
        yield span
    except asyncio.CancelledError:
        fail(span, CANCELLED, "the client went away, or the sidecar stopped")
        raise
    except RequestError as failure:
        if not failure.error_type.isdecimal() or int(failure.error_type) >= least:
            fail(span, failure.error_type, str(failure))
        raise
    except Exception as fault:
        fail(span, type(fault).__name__, FAULT)
        raise
    finally:
        span.end()


def fail(span: Span, error_type: str, message: str) -> None:
    """Give the span an error: status and error.type, as otelhttp does, without an event."""
    if span.recording:
        span.attributes[a.ERROR_TYPE] = error_type
        span.fail(error_type, message, event=False)
