"""A split request: one leg to the prefill server, then one to the decode server, which pulls the KV cache.

Source: llm-d-router, pkg/sidecar/proxy/connector_nixlv2.go.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from time import perf_counter

from llmtrace.semconv import attributes as a
from llmtrace.sidecar.body import (
    KV_TRANSFER_PARAMS,
    Api,
    Body,
    UsageRewriter,
    cached_tokens,
    decode_leg,
    parse,
    prefill_leg,
)
from llmtrace.sidecar.exchange import Answer, Exchange, RefusedError, error
from llmtrace.sidecar.spans import fail, failing
from llmtrace.sidecar.upstream import Caller, CallError, Request, Server
from llmtrace.spans import Span

CONNECTOR = "nixlv2"
REQUEST_ID_HEADER = "x-request-id"
RETRIED = frozenset({502, 503, 504})
"""What a prefill server answers that is overloaded or starts; a call that fails counts as one of these."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retries:
    """How often a prefill leg is repeated, and how many seconds after its last failure."""

    most: int = 0
    backoff_s: float = 0.2


class Split:
    """A request on its way through both legs. ``above`` is its span, ``started`` the perf_counter of its start."""

    def __init__(
        self, caller: Caller, retries: Retries, exchange: Exchange, request: Request, above: Span, started: float
    ) -> None:
        self._caller = caller
        self._retries = retries
        self._exchange = exchange
        self._request = request
        self._above = above
        self._started = started
        headers = request.headers
        self._id = headers[REQUEST_ID_HEADER] = headers.get(REQUEST_ID_HEADER) or str(uuid.uuid4())
        # The sidecar reads both responses; no model server compresses of its own accord.
        headers.pop("accept-encoding", None)

    async def run(
        self, body: Body, api: Api, prefill: Server, target: str, decode: Server, *, data_parallel: bool
    ) -> None:
        """Both legs; ``target`` is how the request named ``prefill``, ``data_parallel`` whether it chose ``decode``.

        Raises RefusedError where a leg fails before the response begins, CallError where the response breaks off.
        """
        started = perf_counter()
        with failing(self._above.child(a.PD_PREFILL_SPAN)) as span:
            span.attributes = {
                a.PROXY_REQUEST_ID: self._id,
                a.PROXY_PREFILL_TARGET: target,
                a.PROXY_CONNECTOR: CONNECTOR,
            }
            try:
                answer = await self._prefill(prefill, body, api, span)
            finally:
                prefill_s = perf_counter() - started
                span.attributes[a.PROXY_PREFILL_DURATION] = prefill_s * 1e3
        decode_started = perf_counter()
        with failing(self._above.child(a.PD_DECODE_SPAN)) as span:
            span.attributes = {
                a.PROXY_REQUEST_ID: self._id,
                a.PROXY_CONNECTOR: CONNECTOR,
                a.PROXY_DECODE_STREAMING: body.get("stream") is True,
                a.PROXY_DECODE_DATA_PARALLEL: data_parallel,
                a.PROXY_TRUE_TTFT: (decode_started - self._started) * 1e3,
                a.PROXY_SUM_PREFILL: prefill_s * 1e3,
                a.PROXY_OVERHEAD: (decode_started - started - prefill_s) * 1e3,
            }
            if not data_parallel:
                span.attributes[a.PROXY_DECODE_TARGET] = decode.address
            try:
                await self._decode(decode, body, answer, span)
            finally:
                ended = perf_counter()
                span.attributes[a.PROXY_DECODE_DURATION] = (ended - decode_started) * 1e3
                span.attributes[a.PROXY_SUM_DECODE] = (ended - decode_started) * 1e3
                span.attributes[a.PROXY_TOTAL_DURATION] = (ended - self._started) * 1e3

    async def _prefill(self, server: Server, body: Body, api: Api, span: Span) -> Body:
        """What the prefill server answered."""
        try:
            leg = prefill_leg(body, api)
        except ValueError as wrong:
            raise RefusedError(error(400, "BadRequestError", f"invalid JSON: {wrong}")) from None
        answer = await self._ask(server, leg, span)
        for attempt in range(self._retries.most):
            if answer.status not in RETRIED:
                break
            _log.info("request %s: prefill repeated (%d) after status %d", self._id, attempt + 1, answer.status)
            await asyncio.sleep(self._retries.backoff_s)
            answer = await self._ask(server, leg, span)
        span.attributes[a.PROXY_PREFILL_STATUS] = answer.status
        if not 200 <= answer.status < 300:
            _log.warning("request %s: the prefill server %s answered %d", self._id, server.address, answer.status)
            raise RefusedError(answer, "prefill request failed")
        try:
            found = parse(answer.body)
        except ValueError as wrong:
            _log.warning("request %s: the prefill server %s answered no JSON", self._id, server.address)
            raise RefusedError(error(400, "BadRequestError", f"invalid JSON of the prefill server: {wrong}")) from None
        if KV_TRANSFER_PARAMS not in found:
            _log.warning("request %s: the prefill server %s sent no %s", self._id, server.address, KV_TRANSFER_PARAMS)
        return found

    async def _ask(self, server: Server, leg: bytes, span: Span) -> Answer:
        try:
            async with self._caller.call(server, self._request, leg, span) as response:
                headers = [header for header in response.headers if header[0] != b"content-length"]
                return Answer(response.status, headers, await response.read())
        except CallError as failed:
            # A refused connection is 503 to the decode server's clients only, where it says that this pod is not ready.
            return error(504 if failed.status == 504 else 502, "BadGateway", f"the prefill server {failed}")

    async def _decode(self, server: Server, body: Body, answer: Body, span: Span) -> None:
        usage = UsageRewriter(cached_tokens(answer))
        await self._exchange.pass_on(self._caller, server, self._request, decode_leg(body, answer), span, usage)
        if self._exchange.status >= 400:
            fail(span, str(self._exchange.status), "decode request failed")
