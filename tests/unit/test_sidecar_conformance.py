"""The sidecar's spans, on good paths and bad ones, and those of llm-d's own, against the registry."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from loopback import free_port
from sidecaring import CHAT, DECODED, PARENT, TRACE, Answer, Seen, chunked, prefilled, says, serving, sidecar
from test_semconv_senders import findings

from llmtrace.semconv import attributes as a
from llmtrace.semconv.conformance import check
from llmtrace.traces.model import Span, Trace


async def breaks(_: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(chunked(b"data: {}\n\n"))
    await writer.drain()
    writer.close()


async def hangs(_: Seen, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("prefill", [prefilled(), says({}, 400), says(status=503), says(b"x"), hangs, None])
@pytest.mark.parametrize("decode", [says(DECODED), says({}, 500), breaks, hangs])
async def test_what_the_sidecar_sends_is_declared(prefill: Answer | None, decode: Answer) -> None:
    async with (
        serving(prefill or hangs) as first,
        serving(decode) as second,
        sidecar(second, prefill_idle_timeout_s=0.2, decode_idle_timeout_s=0.2, prefill_max_retries=1) as proxy,
    ):
        for target in (None, first.address if prefill else f"127.0.0.1:{free_port()}", "no address"):
            with suppress(httpx.HTTPError):
                await proxy.post({"model": "m"}, prefill=target)
        await proxy.post(b"{", "/v1/responses", first.address)
        with suppress(httpx.HTTPError):
            await proxy.client.request("PROPFIND", "/any?x", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert findings(await proxy.spans_up_to("llm_d.pd_proxy.PROPFIND /any"), a.SIDECAR_SERVICE) == []


async def test_refusals_and_disconnects_are_declared(tmp_path: Path) -> None:
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text("endpoints: []")
    async with serving(hangs) as second, sidecar(second, endpoints_file=endpoints) as proxy:
        await proxy.post({"model": "m"}, prefill=second.address)
        with suppress(httpx.TimeoutException):
            await proxy.client.post(CHAT, json={}, timeout=0.2)
        await proxy.spans(5)
        assert findings(proxy.memory.spans(), a.SIDECAR_SERVICE) == []


async def test_a_model_servers_span_hangs_under_the_call_and_decode_may_under_prefill() -> None:
    """In llm-d's own sidecar, the decode leg's span is a child of the prefill leg's."""
    async with serving(prefilled()) as first, serving(says(DECODED)) as second, sidecar(second) as proxy:
        await proxy.post({}, prefill=first.address)
        spans = [replace(s, resource={"service.name": a.SIDECAR_SERVICE}) for s in await proxy.spans(6)]
    named = {span.name: span for span in spans}
    calls = [span for span in spans if span.name == "HTTP POST"]
    server = Span(
        trace_id=TRACE,
        span_id="a" * 16,
        parent_id=calls[0].span_id,
        name=a.SERVER_SPAN,
        kind="SERVER",
        start_ns=1,
        end_ns=2,
        resource={"service.name": a.SERVER_SERVICE},
    )

    def relations(*changed: Span) -> list[str]:
        kept = [span for span in spans if span.span_id not in {c.span_id for c in changed}]
        found = check([Trace(TRACE, (*kept, *changed))]).findings
        return [f"{finding.span}: {finding.detail}" for finding in found if finding.fault == "broken relation"]

    assert relations(server) == []
    assert relations(replace(named["decode"], parent_id=named["prefill"].span_id)) == []
    assert relations(replace(server, parent_id=named["decode"].span_id)) != []
    assert relations(replace(named["prefill"], parent_id=named["decode"].span_id)) != []
