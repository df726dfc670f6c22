"""Reads traces from Grafana Tempo, or from the kit's own store, which answers like it.

The requests and answers are those of Tempo's HTTP API; messages are named as in Tempo's ``tempo.proto``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx

from llmtrace.errors import UserError
from llmtrace.traces.model import Trace
from llmtrace.traces.otlp import MalformedError, decode_trace

_BAD_URL = (httpx.InvalidURL, UnicodeError, OverflowError)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
PAGE = 5000
"""Traces that one search gives at most; the kit's own store gives 10,000."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A trace as a search finds it.

    ``trace_id`` has 32 digits; ``root_service`` and ``root_name`` are those of its root span, or what the
    store says while it has none; ``start_ns`` is nanoseconds since the Unix epoch; ``spans`` counts the
    spans that match.
    """

    trace_id: str
    root_service: str
    root_name: str
    start_ns: int
    duration_ms: int
    spans: int


class TempoClient:
    """A client of Tempo's HTTP API at ``base_url``; may be used from several threads at once.

    Every method raises UserError when the store cannot be reached, refuses, or answers with something else.
    """

    def __init__(self, base_url: str, timeout_s: float = 10) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            url = httpx.URL(self.base_url)
        except (httpx.InvalidURL, TypeError):
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"{base_url!r} is no URL of a trace store; give one like http://127.0.0.1:13200")
        # A proxy of the environment cannot reach this machine's loopback.
        local = url.host == "localhost" or url.host.startswith("127.") or url.host == "::1"
        self._http = httpx.Client(timeout=timeout_s, trust_env=not local)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> bool:
        """Whether the store answers that it is ready; never raises."""
        try:
            return self._http.get(f"{self.base_url}/ready").status_code == httpx.codes.OK
        except (httpx.HTTPError, *_BAD_URL):
            return False

    def trace(self, trace_id: str) -> Trace | None:
        """The trace with this hexadecimal id, or None when the store has none."""
        path = f"/api/v2/traces/{quote(trace_id, safe='')}"
        response = self._get(path, accept="application/protobuf")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        try:
            return decode_trace(trace_id.lower().rjust(32, "0"), _field_of_response(response.content))
        except MalformedError:
            raise self._not_tempo(path) from None

    def search(self, q: str, *, start_s: int, end_s: int, limit: int) -> list[TraceSummary]:
        """Traces with spans that match the TraceQL query ``q``, newest first.

        ``start_s`` and ``end_s`` are seconds since the Unix epoch; ``limit`` is the most traces to return.
        """
        document = self._json("/api/search", {"q": q, "start": str(start_s), "end": str(end_s), "limit": str(limit)})
        try:
            found = [_summary(entry) for entry in document.get("traces") or []]
        except (TypeError, ValueError, AttributeError, KeyError):
            raise self._not_tempo("/api/search") from None
        return sorted(found, key=lambda summary: summary.start_ns, reverse=True)

    def tags(self, scope: str | None = None) -> list[str]:
        """Names of attributes in a scope (span, resource, intrinsic, ...), or in all of them, sorted."""
        document = self._json("/api/v2/search/tags", {"scope": scope} if scope else {})
        try:
            return sorted({str(tag) for part in document.get("scopes") or [] for tag in part.get("tags") or []})
        except (TypeError, AttributeError):
            raise self._not_tempo("/api/v2/search/tags") from None

    def tag_values(self, tag: str, q: str | None = None) -> list[str]:
        """Values of an attribute such as ``span.http.route``, of the spans that match ``q``, sorted."""
        path = f"/api/v2/search/tag/{quote(tag, safe='')}/values"
        document = self._json(path, {"q": q} if q else {})
        try:
            return sorted({str(entry["value"]) for entry in document.get("tagValues") or []})
        except (TypeError, KeyError):
            raise self._not_tempo(path) from None

    def _json(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        response = self._get(path, parameters, accept="application/json")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise self._not_tempo(path)
        try:
            document = response.json()
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._not_tempo(path)
        return document

    def _get(self, path: str, parameters: Mapping[str, str] | None = None, *, accept: str) -> httpx.Response:
        try:
            response = self._http.get(f"{self.base_url}{path}", params=parameters, headers={"Accept": accept})
        except httpx.TimeoutException:
            raise UserError(
                f"the trace store at {self.base_url} has not answered {path} within {self._timeout_s:g} s; "
                "try again, or look at its log"
            ) from None
        except httpx.DecodingError:
            raise self._not_tempo(path) from None
        except (httpx.HTTPError, *_BAD_URL) as error:
            raise UserError(
                f"the trace store at {self.base_url} cannot be reached ({_reason(error)}); start it with "
                "`llmtrace up`, or give the URL of a Tempo with --store"
            ) from None
        if response.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
            raise UserError(
                f"the trace store at {self.base_url} answered {path} with HTTP {response.status_code}"
                f"{_said(response)}; {_remedy(response.status_code)}"
            )
        return response

    def _not_tempo(self, path: str) -> UserError:
        return UserError(
            f"{self.base_url}{path} did not answer as Tempo does; check that the URL is that of a Tempo, "
            "or of the kit's store"
        )


def search_all(store: TempoClient, q: str, *, start_s: int, end_s: int) -> list[TraceSummary]:
    """All traces with spans that match the TraceQL query ``q``, each once, newest first.

    A search gives no more than :data:`PAGE`; of a time with more, the halves are searched. UserError where a single
    second has more, and from the store.
    """
    found = store.search(q, start_s=start_s, end_s=end_s, limit=PAGE)
    if len(found) < PAGE:
        return found
    if start_s >= end_s:
        raise UserError(f"the second {start_s} (Unix time) has {PAGE} traces of {q} or more: no search gives them all")
    middle_s = (start_s + end_s) // 2
    halves = (start_s, middle_s), (middle_s + 1, end_s)
    distinct = {s.trace_id: s for half in halves for s in search_all(store, q, start_s=half[0], end_s=half[1])}
    return sorted(distinct.values(), key=lambda summary: summary.start_ns, reverse=True)


def _summary(entry: Mapping[str, Any]) -> TraceSummary:
    sets = entry.get("spanSets") or [entry.get("spanSet") or {}]
    trace_id = str(entry["traceID"])
    int(trace_id, 16)
    return TraceSummary(
        trace_id=trace_id.lower().rjust(32, "0"),
        root_service=str(entry.get("rootServiceName", "")),
        root_name=str(entry.get("rootTraceName", "")),
        start_ns=int(entry.get("startTimeUnixNano", 0)),
        duration_ms=int(entry.get("durationMs", 0)),
        spans=sum(int(part.get("matched", 0)) for part in sets),
    )


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _said(response: httpx.Response) -> str:
    text = " ".join(response.text.split())[:200].rstrip(".")
    return f" ({text})" if text else ""


def _remedy(status: int) -> str:
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return "give a URL that needs no credentials, or a proxy that adds them"
    if status < httpx.codes.INTERNAL_SERVER_ERROR:
        return "correct the request, or check that the URL is that of a Tempo"
    return "try again, or look at its log"


def _field_of_response(data: bytes) -> bytes:
    """The ``trace`` (field 1) of a serialized TraceByIDResponse; empty when it has none.

    Tempo's messages are in no Python package, and of this one a single field is needed.
    """
    trace = b""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _BYTES:
            length, position = _varint(data, position)
            end = position + length
            if number == 1:
                trace += data[position:end]
            position = end
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            position = len(data) + 1
    if position != len(data):
        raise MalformedError("the bytes are no protobuf message of type TraceByIDResponse")
    return trace


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise MalformedError("the bytes are no protobuf message of type TraceByIDResponse")
