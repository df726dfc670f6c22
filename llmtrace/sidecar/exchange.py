"""One request at the sidecar and the response to it, as ASGI shows them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from llmtrace.semconv import attributes as a
from llmtrace.sidecar.body import UsageRewriter, dump
from llmtrace.sidecar.spans import CANCELLED, FAULT, RequestError, fail, server_attributes
from llmtrace.sidecar.upstream import Caller, CallError, Headers, Request, Response, Server
from llmtrace.spans import Span

MAX_BODY_BYTES = 128 << 20
"""A larger request is answered with 413; the body is held in memory until it is complete."""
NOT_READY = (
    "The decode node is not ready. Please check that the vLLM service is running and the port configuration is correct."
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A response that is there as a whole; ``headers`` without its length."""

    status: int
    headers: Headers
    body: bytes


class RefusedError(RequestError):
    """The request ends with this answer; the message is for the span of what failed."""

    def __init__(self, answer: Answer, message: str = "") -> None:
        super().__init__(str(answer.status), message)
        self.answer = answer


def error(status: int, kind: str, message: str) -> Answer:
    """An error as vLLM words it, which llm-d's sidecar imitates (errors.go)."""
    content = {"object": "error", "message": message, "type": kind, "param": "", "code": status}
    return Answer(status, [(b"content-type", b"application/json")], dump(content))


class Exchange:
    """A request, of which ``headers`` have their names in lower case and their first values, and its response.

    ``status`` is 0 until the response begins.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        self.status = 0
        self._receive = receive
        self._send = send
        self._sent_bytes = 0
        self._complete = False
        self._gone = False

    async def run(self, span: Span, work: Callable[[bytes], Awaitable[None]]) -> None:
        """Answer the request by ``work``, which is given the body; ``span``, that of the request, ends."""
        if span.recording:
            span.attributes = server_attributes(self.scope, self.headers)
        try:
            await self._run(span, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self._gone:
                fail(span, CANCELLED, "the sidecar stopped")
                raise
            task.uncancel()
            fail(span, "ClientDisconnect", "the client went away")
        except Exception as fault:
            _log.exception("%r: %s", self.scope["path"], FAULT)
            fail(span, type(fault).__name__, FAULT)
            if not self.status:
                await self.answer(error(500, "InternalServerError", FAULT))
        finally:
            self._finish(span)

    async def _run(self, span: Span, work: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            body = await self._read(span)
            if body is None:
                return
            watch = asyncio.create_task(self._watch(asyncio.current_task()))
            try:
                await work(body)
            finally:
                watch.cancel()
        except RefusedError as refused:
            await self.answer(refused.answer)
        except CallError as broken:
            # The client must see a response that breaks off, not one that is complete.
            _log.warning("%r: the response broke off: %s", self.scope["path"], broken)
            fail(span, broken.error_type, str(broken))

    async def answer(self, answer: Answer) -> None:
        """Respond with what is there as a whole."""
        length = (b"content-length", str(len(answer.body)).encode())
        await self._start(answer.status, [*answer.headers, length])
        await self._part(answer.body, last=True)

    async def pass_on(
        self,
        caller: Caller,
        server: Server,
        request: Request,
        body: bytes,
        above: Span,
        usage: UsageRewriter | None = None,
    ) -> None:
        """Call the decode server and respond with its response, part by part as it comes, its usage rewritten.

        Raises RefusedError where it does not answer, CallError where its response breaks off.
        """
        try:
            async with caller.call(server, request, body, above) as response:
                await self._respond(response, usage)
        except CallError as failed:
            if self.status:
                raise
            text = f"the decode server {failed}"
            _log.warning("%s", text)
            refused = failed.status == 503
            answer = (
                error(503, "ServiceUnavailable", NOT_READY) if refused else error(failed.status, "BadGateway", text)
            )
            raise RefusedError(answer, text) from failed

    async def _respond(self, response: Response, usage: UsageRewriter | None) -> None:
        if usage is None or response.status >= 300:
            await self._relay(response, response.headers, lambda part: part)
            return
        headers = [header for header in response.headers if header[0] != b"content-length"]
        if "text/event-stream" in response.content_type:
            await self._relay(response, headers, usage.stream, usage.end)
        else:
            await self.answer(Answer(response.status, headers, usage.whole(await response.read())))

    async def _relay(
        self,
        response: Response,
        headers: Headers,
        change: Callable[[bytes], bytes],
        rest: Callable[[], bytes] = bytes,
    ) -> None:
        await self._start(response.status, headers)
        async for chunk in response.chunks():
            if part := change(chunk):
                await self._part(part)
        await self._part(rest(), last=True)

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _part(self, part: bytes, *, last: bool = False) -> None:
        self._complete = last
        self._sent_bytes += len(part)
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _watch(self, task: asyncio.Task[Any] | None) -> None:
        """Cancel the task that answers the request when the client goes away."""
        await self._receive()  # after the body comes nothing but the end of the connection
        if task is not None and not self._complete:
            self._gone = True
            task.cancel()

    async def _read(self, span: Span) -> bytes | None:
        """The request's body; None where the client goes away before its end."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                fail(span, "ClientDisconnect", "the client went away before the end of its request")
                return None
            parts.append(message["body"])
            size += len(parts[-1])
            if size > MAX_BODY_BYTES:
                text = f"the request body is larger than {MAX_BODY_BYTES} bytes"
                raise RefusedError(error(413, "RequestEntityTooLarge", text))
            if not message["more_body"]:
                if size and span.recording:
                    span.attributes[a.HTTP_REQUEST_SIZE] = size
                return b"".join(parts)

    def _finish(self, span: Span) -> None:
        if span.recording and self.status:
            span.attributes[a.HTTP_STATUS] = self.status
            if self._sent_bytes:
                span.attributes[a.HTTP_RESPONSE_SIZE] = self._sent_bytes
            if self.status >= 500 and a.ERROR_TYPE not in span.attributes:
                fail(span, str(self.status), "")
        span.end()
