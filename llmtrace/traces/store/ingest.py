"""POST /v1/traces, as the OTLP specification (section OTLP/HTTP) asks."""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from dataclasses import dataclass

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llmtrace.traces.otlp import JSON, PROTOBUF, MalformedError, parse_request
from llmtrace.traces.store.batch import Batch, prepare
from llmtrace.traces.store.database import Database, QueueFullError

RETRY_AFTER_S = 2
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _UNAVAILABLE = 3, 8, 14
_CODES = {503: _UNAVAILABLE, 413: _RESOURCE_EXHAUSTED}
_CHUNK = 256 * 1024
_GZIP = 16 + zlib.MAX_WBITS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest body in bytes as it is sent with gzip, the largest when unpacked, and requests at once.

    In memory, unpacked spans take up to twenty times their size.
    """

    compressed_bytes: int = 4 * 2**20
    body_bytes: int = 16 * 2**20
    requests: int = 16


class RefusedError(Exception):
    """A request that is answered with an error; the text is one sentence without payload."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Ingest:
    """The handler of POST /v1/traces."""

    def __init__(self, database: Database, limits: Limits | None = None) -> None:
        self._database = database
        self._limits = limits or Limits()
        self._requests = 0
        self._parsers = asyncio.Semaphore(2)

    async def __call__(self, request: Request) -> Response:
        """Store the spans of a request and answer when they are durable."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        answer_type = JSON if content_type == JSON else PROTOBUF
        self._requests += 1
        try:
            batch = await self._receive(request, content_type)
            if len(batch):
                await asyncio.wrap_future(self._database.write(batch))
        except RefusedError as refused:
            return self._refuse(refused.status, str(refused), answer_type)
        except MalformedError as malformed:
            return self._refuse(400, str(malformed), answer_type)
        except QueueFullError:
            return self._refuse(503, "the writer is behind; try again", answer_type)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            log.error("a request could not be stored: %s", type(error).__name__)  # noqa: TRY400
            return self._refuse(503, "the spans could not be written; try again", answer_type)
        finally:
            self._requests -= 1
        return _answer(batch, answer_type)

    async def _receive(self, request: Request, content_type: str) -> Batch:
        if self._requests > self._limits.requests:
            raise RefusedError(503, "too many requests at once; try again")
        if content_type not in (PROTOBUF, JSON):
            raise RefusedError(415, f"the content type must be {PROTOBUF} or {JSON}")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("gzip", "identity", ""):
            raise RefusedError(415, "the content encoding must be gzip or none")
        gzip = encoding == "gzip"
        body = await self._read(request, self._limits.compressed_bytes if gzip else self._limits.body_bytes)
        async with self._parsers:
            return await asyncio.to_thread(_parse, body, gzip, content_type, self._limits.body_bytes)

    async def _read(self, request: Request, limit: int) -> bytes:
        too_large = RefusedError(413, f"the body is larger than {limit} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        chunks = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    def _refuse(self, status: int, message: str, answer_type: str) -> Response:
        log.warning("refused a request with %d: %s", status, message)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        content = _status(_CODES.get(status, _INVALID_ARGUMENT), message, answer_type)
        return Response(content, status, headers, media_type=answer_type)


def _parse(body: bytes, gzip: bool, content_type: str, limit: int) -> Batch:
    return prepare(parse_request(_unpacked(body, limit) if gzip else body, content_type))


def _unpacked(body: bytes, limit: int) -> bytes:
    chunks = []
    size = 0
    rest = body
    try:
        while rest:  # a gzip file may have several members
            unpacker = zlib.decompressobj(_GZIP)
            while not unpacker.eof:
                chunk = unpacker.decompress(rest, _CHUNK)
                rest = unpacker.unconsumed_tail
                size += len(chunk)
                if size > limit:
                    raise RefusedError(413, f"the unpacked body is larger than {limit} bytes")
                chunks.append(chunk)
                if not chunk and not rest and not unpacker.eof:
                    raise MalformedError("the body ends before its gzip data is complete")
            rest = unpacker.unused_data
    except zlib.error:
        raise MalformedError("the body is not the gzip data that its content encoding names") from None
    return b"".join(chunks)


def _answer(batch: Batch, answer_type: str) -> Response:
    response = ExportTraceServiceResponse()
    if batch.rejected:
        response.partial_success.rejected_spans = batch.rejected
        response.partial_success.error_message = f"{batch.rejected} spans are invalid: {batch.complaint}"
        log.warning("left out %d invalid spans: %s", batch.rejected, batch.complaint)
    if answer_type == JSON:
        content = json_format.MessageToJson(response, indent=None).encode()
    else:
        content = response.SerializeToString()
    return Response(content, media_type=answer_type)


def _status(code: int, message: str, answer_type: str) -> bytes:
    """A google.rpc.Status, whose field 1 is the code and field 2 the message (of under 128 bytes here)."""
    if answer_type == JSON:
        return json.dumps({"code": code, "message": message}).encode()
    text = message.encode()[:127]
    return bytes((0x08, code, 0x12, len(text))) + text
