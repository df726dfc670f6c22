"""What a client gets, and what the spans say, where a server or the client itself fails."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from loopback import WAIT_S, free_port
from sidecaring import (
    CHAT,
    DECODED,
    PARAMS,
    TRACE,
    TRACEPARENT,
    Answer,
    Seen,
    Server,
    Sidecar,
    certificates,
    chunked,
    prefilled,
    says,
    serving,
    sidecar,
)

from llmtrace.semconv import attributes as a
from llmtrace.sidecar import exchange
from llmtrace.traces.model import Span

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "CANARY"}]}
SERVER_SPAN = f"llm_d.pd_proxy.POST {CHAT}"
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'


async def hangs(_: Seen, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def dies(_: Seen, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def breaks_after(raw: bytes) -> Answer:
    """Sends ``raw`` and closes the connection."""

    async def answer(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        writer.close()

    return answer


def hangs_after(raw: bytes) -> Answer:
    async def answer(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        await asyncio.sleep(60)

    return answer


def one(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def statuses(spans: list[Span]) -> dict[str, tuple[str, object]]:
    """Status and error.type by name; the call spans by the name of their parent's."""
    by_id = {span.span_id: span for span in spans}
    return {
        f"HTTP below {by_id[str(s.parent_id)].name}" if s.name.startswith("HTTP") else s.name: (
            s.status,
            s.attributes.get(a.ERROR_TYPE),
        )
        for s in spans
    }


OK = ("UNSET", None)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_prefill_is_repeated_where_the_server_is_overloaded(status: int) -> None:
    async with (
        serving(says(status=status), says(status=status), prefilled()) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_max_retries=2, prefill_retry_backoff_s=0.001) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
        spans = await proxy.spans(8)
    assert response.status_code == 200
    assert len(prefill.requests) == 3
    assert len({seen.body for seen in prefill.requests}) == 1
    assert len({seen.get("x-request-id") for seen in [*prefill.requests, *decode.requests]}) == 1
    assert decode.requests[0].json["kv_transfer_params"] == PARAMS
    leg = one(spans, "prefill")
    assert (leg.status, leg.attributes[a.PROXY_PREFILL_STATUS]) == ("UNSET", 200)
    calls = sorted((s for s in spans if s.parent_id == leg.span_id), key=lambda s: s.start_ns)
    assert [s.status for s in calls] == ["ERROR", "ERROR", "UNSET"]
    assert [s.attributes[a.HTTP_STATUS] for s in calls] == [status, status, 200]


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
async def test_what_stays_overloaded_is_the_clients_answer(retries: int, calls: int) -> None:
    async with (
        serving(says(b"try later", 503, "text/plain", {"retry-after": "7", "connection": "close"})) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_max_retries=retries, prefill_retry_backoff_s=0.001) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
        found = statuses(await proxy.spans(3 + calls))
    assert (response.status_code, response.content) == (503, b"try later")
    assert (response.headers["retry-after"], response.headers["content-type"]) == ("7", "text/plain")
    assert len(prefill.requests) == calls
    assert decode.requests == []
    failed = ("ERROR", "503")
    assert found == {SERVER_SPAN: failed, "forward_request": failed, "prefill": failed, "HTTP below prefill": failed}


@pytest.mark.parametrize("status", [302, 400, 404, 422, 429, 500, 501])
async def test_no_other_status_is_repeated(status: int) -> None:
    """isRetryableStatus and isHTTPError of proxy_helpers.go."""
    async with (
        serving(says({"message": "no"}, status)) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_max_retries=2, prefill_retry_backoff_s=0.001) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
        spans = await proxy.spans(4)
    assert (response.status_code, response.json()) == (status, {"message": "no"})
    assert (len(prefill.requests), decode.requests) == (1, [])
    found = statuses(spans)
    assert found["prefill"] == ("ERROR", str(status))
    assert one(spans, "prefill").status_message == "prefill request failed"
    assert found["HTTP below prefill"] == (("ERROR", str(status)) if status >= 400 else OK)
    for name in ("forward_request", SERVER_SPAN):
        assert found[name] == (("ERROR", str(status)) if status >= 500 else OK), "the client's fault is no server error"


@pytest.mark.parametrize(
    ("answer", "status", "kind"),
    [
        (dies, 502, "ServerDisconnectedError"),
        (breaks_after(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), 502, "ClientPayloadError"),
        (breaks_after(chunked(b'{"a": ', kind="application/json")), 502, "ClientPayloadError"),
        (breaks_after(b"\x16\x03\x01\r\n\r\n"), 502, "ClientResponseError"),
        (hangs, 504, "SocketTimeoutError"),
        (hangs_after(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), 504, "SocketTimeoutError"),
    ],
)
async def test_a_prefill_server_that_breaks_off_or_hangs(answer: Answer, status: int, kind: str) -> None:
    async with (
        serving(answer) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_idle_timeout_s=0.3) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
        spans = await proxy.spans(4)
    assert (response.status_code, response.json()["type"]) == (status, "BadGateway")
    assert prefill.address in response.json()["message"]
    assert decode.requests == []
    found = statuses(spans)
    assert found["HTTP below prefill"] == ("ERROR", kind)
    assert found["prefill"] == found["forward_request"] == found[SERVER_SPAN] == ("ERROR", str(status))
    assert one(spans, "prefill").attributes[a.PROXY_PREFILL_STATUS] == status


@pytest.mark.parametrize("tls", [frozenset(), frozenset({"prefiller"})])
async def test_a_prefill_server_that_reads_nothing(tls: frozenset[str]) -> None:
    """A process that is stopped still has a kernel that takes connections."""
    async with serving(says(DECODED)) as decode:
        with socket.socket() as stopped:
            stopped.bind(("127.0.0.1", 0))
            stopped.listen()
            address = f"127.0.0.1:{stopped.getsockname()[1]}"
            async with sidecar(decode, prefill_idle_timeout_s=0.3, connect_timeout_s=0.3, enable_tls=tls) as proxy:
                response = await proxy.post({"text": "x" * (16 << 20)}, prefill=address)
                found = statuses(await proxy.spans(4))
    assert (response.status_code, decode.requests) == (504, [])
    kind = "ConnectionTimeoutError" if tls else "TimeoutError"
    assert found["HTTP below prefill"] == ("ERROR", kind)


async def test_a_prefill_server_that_recovers_from_a_hang() -> None:
    async with (
        serving(hangs, prefilled()) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_idle_timeout_s=0.3, prefill_max_retries=1, prefill_retry_backoff_s=0.001) as proxy,
    ):
        assert (await proxy.post(REQUEST, prefill=prefill.address)).status_code == 200
        assert len(prefill.requests) == 2


async def test_a_prefill_server_that_is_not_there() -> None:
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(REQUEST, prefill=f"127.0.0.1:{free_port()}")
        found = statuses(await proxy.spans(4))
    assert (response.status_code, response.json()["type"]) == (502, "BadGateway")
    assert found["HTTP below prefill"] == ("ERROR", "ClientConnectorError")
    assert decode.requests == []


async def test_a_prefill_server_that_answers_no_json() -> None:
    async with serving(says(b"<html>")) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(REQUEST, prefill=prefill.address)
        found = statuses(await proxy.spans(4))
    assert (response.status_code, response.json()["type"]) == (400, "BadRequestError")
    assert "prefill server" in response.json()["message"]
    assert found["prefill"] == ("ERROR", "400")
    assert decode.requests == []


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"null", b'{"x": NaN}', b"\xff", b"[" * 100_000, b'{"x": 1e999}'])
async def test_a_body_that_is_no_object(raw: bytes) -> None:
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(raw, prefill=prefill.address)
    content = response.json()
    assert (response.status_code, content["object"], content["type"], content["code"]) == (
        *(400, "error", "BadRequestError"),
        400,
    )
    assert content["message"].startswith("invalid JSON: ")
    assert (prefill.requests, decode.requests) == ([], [])


async def test_without_prefill_the_body_is_the_model_servers_matter() -> None:
    async with serving(says({"message": "bad"}, 400)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(b"{ \xff")
        found = statuses(await proxy.spans(3))
    assert (response.status_code, decode.requests[0].body) == (400, b"{ \xff")
    assert found == {SERVER_SPAN: OK, "forward_request": OK, "HTTP below forward_request": ("ERROR", "400")}


async def test_a_body_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_BODY_BYTES", 100)
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        assert (await proxy.post(b"x" * 100)).status_code == 200
        response = await proxy.post(b"x" * 101)
    assert (response.status_code, response.json()["message"]) == (413, "the request body is larger than 100 bytes")
    assert len(decode.requests) == 1


@pytest.mark.parametrize("split", [False, True])
async def test_a_decode_server_that_is_not_there(split: bool) -> None:
    async with serving(prefilled()) as prefill, sidecar(free_port()) as proxy:
        response = await proxy.post(REQUEST, prefill=prefill.address if split else None)
        found = statuses(await proxy.spans(6 if split else 3))
    assert response.status_code == 503
    assert response.json() == {
        "object": "error",
        "message": exchange.NOT_READY,
        "type": "ServiceUnavailable",
        "param": "",
        "code": 503,
    }, "decoderServiceUnavailableResponseJSON of errors.go"
    failed = ("ERROR", "503")
    assert found[SERVER_SPAN] == found["forward_request"] == failed
    assert found["HTTP below decode" if split else "HTTP below forward_request"][1] == "ClientConnectorError"
    if split:
        assert (found["prefill"], found["decode"]) == (OK, failed)


@pytest.mark.parametrize(("answer", "status"), [(dies, 502), (hangs, 504)])
@pytest.mark.parametrize("split", [False, True])
async def test_a_decode_server_that_does_not_answer(answer: Answer, status: int, split: bool) -> None:
    async with (
        serving(prefilled()) as prefill,
        serving(answer) as decode,
        sidecar(decode, decode_idle_timeout_s=0.3) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address if split else None)
        found = statuses(await proxy.spans(6 if split else 3))
    assert (response.status_code, response.json()["type"]) == (status, "BadGateway")
    assert found[SERVER_SPAN] == found["forward_request"] == ("ERROR", str(status))


@pytest.mark.parametrize("status", [400, 500])
async def test_what_the_decode_server_refuses_is_the_clients_answer(status: int) -> None:
    async with (
        serving(prefilled()) as prefill,
        serving(says({"usage": {"x": 1}}, status)) as decode,
        sidecar(decode) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
        found = statuses(await proxy.spans(6))
    assert (response.status_code, response.json()) == (status, {"usage": {"x": 1}})
    assert found["decode"] == found["HTTP below decode"] == ("ERROR", str(status))
    assert found["prefill"] == OK
    assert found["forward_request"] == found[SERVER_SPAN] == (OK if status < 500 else ("ERROR", str(status)))


@pytest.mark.parametrize(
    ("answer", "kind"), [(breaks_after, "ClientPayloadError"), (hangs_after, "SocketTimeoutError")]
)
@pytest.mark.parametrize("split", [False, True])
async def test_a_stream_that_breaks_off_or_hangs_is_broken_for_the_client(
    answer: Callable[[bytes], Answer], kind: str, split: bool
) -> None:
    async with (
        serving(prefilled()) as prefill,
        serving(answer(chunked(EVENT))) as decode,
        sidecar(decode, decode_idle_timeout_s=0.3) as proxy,
    ):
        received: list[bytes] = []

        async def stream() -> None:
            async with proxy.client.stream("POST", CHAT, content=content, headers=headers) as response:
                assert response.status_code == 200
                async for chunk in response.aiter_raw():
                    received.append(chunk)  # noqa: PERF401 - what came before the break counts

        headers = {"traceparent": TRACEPARENT} | ({"x-prefiller-host-port": prefill.address} if split else {})
        content = json.dumps({**REQUEST, "stream": True})
        with pytest.raises(httpx.RemoteProtocolError):
            await stream()
        spans = await proxy.spans(6 if split else 3)
    assert received == [EVENT]
    found = statuses(spans)
    broken = ("ERROR", kind)
    assert found[SERVER_SPAN] == found["forward_request"] == broken
    if split:
        assert found["decode"] == found["HTTP below decode"] == broken
        assert (found["prefill"], found["HTTP below prefill"]) == (OK, OK)
        assert one(spans, "decode").attributes[a.PROXY_DECODE_DURATION] > 0  # type: ignore[operator]
    else:
        assert found["HTTP below forward_request"] == broken


async def test_a_whole_response_that_breaks_off_is_an_error_where_it_can_be_told() -> None:
    async with (
        serving(prefilled()) as prefill,
        serving(
            breaks_after(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        ) as decode,
        sidecar(decode) as proxy,
    ):
        response = await proxy.post(REQUEST, prefill=prefill.address)
    assert (response.status_code, response.json()["type"]) == (502, "BadGateway")


async def test_parts_of_a_stream_do_not_wait_for_the_next() -> None:
    more = asyncio.Event()

    async def answer(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(EVENT))
        await asyncio.wait_for(more.wait(), WAIT_S)
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVENT), EVENT))

    async with serving(prefilled()) as prefill, serving(answer) as decode, sidecar(decode) as proxy:
        for split in (False, True):
            more.clear()
            headers = {"x-prefiller-host-port": prefill.address} if split else {}
            content = json.dumps({**REQUEST, "stream": True})
            async with proxy.client.stream("POST", CHAT, content=content, headers=headers) as response:
                parts = response.aiter_raw()
                assert await anext(parts) == EVENT
                more.set()
                assert b"".join([part async for part in parts]) == EVENT


async def raw_request(proxy: Sidecar, prefill: Server | None) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    body = json.dumps({**REQUEST, "stream": True}).encode()
    header = f"x-prefiller-host-port: {prefill.address}\r\n" if prefill else ""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntraceparent: {TRACEPARENT}\r\n{header}content-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return writer


async def test_a_client_that_goes_away_stops_the_prefill_leg() -> None:
    async with serving(hangs) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        writer = await raw_request(proxy, prefill)
        await asyncio.wait_for(prefill.arrived.wait(), WAIT_S)
        writer.close()
        await asyncio.wait_for(prefill.left.wait(), WAIT_S)
        found = statuses(await proxy.spans(4))
    assert decode.requests == []
    assert found.pop(SERVER_SPAN) == ("ERROR", "ClientDisconnect")
    assert set(found.values()) == {("ERROR", "Cancelled")}


@pytest.mark.parametrize("answer", [hangs, hangs_after(chunked(EVENT))])
@pytest.mark.parametrize("split", [False, True])
async def test_a_client_that_goes_away_stops_the_decode_leg(answer: Answer, split: bool) -> None:
    async with serving(prefilled()) as prefill, serving(answer) as decode, sidecar(decode) as proxy:
        writer = await raw_request(proxy, prefill if split else None)
        await asyncio.wait_for(decode.arrived.wait(), WAIT_S)
        writer.close()
        await asyncio.wait_for(decode.left.wait(), WAIT_S)
        spans = await proxy.spans(6 if split else 3)
    found = statuses(spans)
    assert found[SERVER_SPAN] == ("ERROR", "ClientDisconnect")
    gone = ("ERROR", "Cancelled")
    assert found["forward_request"] == found["HTTP below decode" if split else "HTTP below forward_request"] == gone


async def test_a_client_that_goes_away_between_two_attempts() -> None:
    async with (
        serving(says(status=503)) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefill_max_retries=5, prefill_retry_backoff_s=60.0) as proxy,
    ):
        writer = await raw_request(proxy, prefill)
        await asyncio.wait_for(prefill.arrived.wait(), WAIT_S)
        writer.close()
        found = statuses(await proxy.spans(4))
    assert (len(prefill.requests), found["prefill"]) == (1, ("ERROR", "Cancelled"))


async def test_a_client_that_goes_away_within_its_request() -> None:
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntraceparent: {TRACEPARENT}\r\ncontent-length: 9\r\n\r\n{{".encode()
        )
        await writer.drain()
        writer.close()
        (span,) = await proxy.spans(1)
    assert (span.status, span.attributes[a.ERROR_TYPE]) == ("ERROR", "ClientDisconnect")
    assert decode.requests == []


async def test_a_fault_of_the_sidecar_is_an_answer_and_no_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("llmtrace.sidecar.proxy._candidates", fault)
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(REQUEST)
        spans = await proxy.spans(2)
        assert (await proxy.client.get("/v1/models")).status_code == 200
    assert (response.status_code, response.json()["type"]) == (500, "InternalServerError")
    assert set(statuses(spans).values()) == {("ERROR", "ZeroDivisionError")}
    assert "a fault of the sidecar" in caplog.text


async def test_only_listed_prefill_servers_are_called(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"

    def listed(*servers: Server) -> None:
        entries = [{"name": f"p{s.port}", "address": "127.0.0.1", "port": str(s.port)} for s in servers]
        new = path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"endpoints": entries}))
        new.replace(path)

    async with serving(prefilled()) as first, serving(prefilled()) as second, serving(says(DECODED)) as decode:
        listed(first)
        async with sidecar(decode, endpoints_file=path) as proxy:
            assert (await proxy.post(REQUEST, prefill=first.address)).status_code == 200
            assert (await proxy.post(REQUEST, prefill=f"http://{first.address}")).status_code == 200
            await proxy.spans(12)
            proxy.memory.ended.clear()
            response = await proxy.post(REQUEST, prefill=second.address)
            spans = await proxy.spans(2)
            for unlisted in ("127.0.0.1", f"localhost:{first.port}", f"{first.address},{second.address}x"):
                wanted = 200 if unlisted.startswith(first.address) else 403
                assert (await proxy.post(REQUEST, prefill=unlisted)).status_code == wanted
            assert second.requests == []
            listed(second)
            for _ in range(100):
                if (await proxy.post(REQUEST, prefill=second.address)).status_code == 200:
                    break
                await asyncio.sleep(0.1)
            assert len(second.requests) == 1, "a change of the file is taken up"
            assert (await proxy.post(REQUEST, prefill=first.address)).status_code == 403
            path.write_text("endpoints: [")
            await asyncio.sleep(0.3)
            assert (await proxy.post(REQUEST, prefill=second.address)).status_code == 200
    assert (response.status_code, response.text) == (403, "Forbidden: prefill target not allowed by SSRF protection\n")
    forward = one(spans, "forward_request")
    assert (forward.status, forward.status_message) == ("ERROR", "SSRF protection: prefill target not in allowlist")
    assert forward.attributes[a.PROXY_ERROR] == "ssrf_protection_denied"
    assert forward.attributes[a.PROXY_DENIED_TARGET] == second.address
    assert one(spans, SERVER_SPAN).status == "UNSET"


@pytest.mark.parametrize("target", ["nonsense:port", "evil@127.0.0.1:1", "127.0.0.1:1/path", "a b"])
async def test_a_prefill_server_that_is_no_address(target: str) -> None:
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post(REQUEST, prefill=target)
    assert (response.status_code, response.json()["type"], decode.requests) == (502, "BadGateway", [])


def trusting(folder: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(folder / "tls.crt")
    return context


async def test_the_sidecar_serves_tls_and_takes_up_a_new_certificate(tmp_path: Path) -> None:
    folder = certificates(tmp_path / "tls")
    trusted = trusting(folder)
    async with (
        serving(says(DECODED)) as decode,
        sidecar(decode, scheme="https", verify=trusted, secure_proxy=True, cert_path=folder) as proxy,
    ):
        response = await proxy.post(REQUEST)
        assert (response.status_code, decode.requests[0].target) == (200, CHAT)
        assert one(await proxy.spans(3), SERVER_SPAN).attributes[a.URL_SCHEME] == "https"
        certificates(folder)
        base = f"https://127.0.0.1:{proxy.port}"
        for _ in range(100):
            async with httpx.AsyncClient(base_url=base, trust_env=False, verify=trusting(folder)) as client:
                try:
                    assert (await client.get("/health")).status_code == 200
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.1)
        else:
            pytest.fail("the new certificate was not used within 10 s")
        (folder / "tls.key").write_text("broken")
        await asyncio.sleep(0.3)
        async with httpx.AsyncClient(base_url=base, trust_env=False, verify=trusting(folder)) as client:
            assert (await client.get("/health")).status_code == 200, "a broken pair changes nothing"


async def test_without_a_certificate_the_sidecar_signs_its_own() -> None:
    async with (
        serving(says(DECODED)) as decode,
        sidecar(decode, scheme="https", verify=False, secure_proxy=True) as proxy,
    ):
        assert (await proxy.post(REQUEST)).status_code == 200


@pytest.mark.parametrize(
    ("skip", "trust", "status"), [((), True, 200), ((), False, 502), (("prefiller", "decoder"), False, 200)]
)
async def test_model_servers_are_called_by_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: tuple[str, ...], trust: bool, status: int
) -> None:
    folder = certificates(tmp_path / "tls")
    if trust:
        monkeypatch.setenv("SSL_CERT_FILE", str(folder / "tls.crt"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    both = frozenset({"prefiller", "decoder"})
    async with (
        serving(prefilled(), ssl=context) as prefill,
        serving(says(DECODED), ssl=context) as decode,
        sidecar(decode, enable_tls=both, tls_insecure_skip_verify=frozenset(skip)) as proxy,
    ):
        for target in (None, prefill.address):
            response = await proxy.post(REQUEST, prefill=target)
            assert response.status_code == status, response.text
        if status == 200:
            urls = sorted({str(s.attributes.get(a.URL_FULL)) for s in await proxy.spans(9) if s.kind == "CLIENT"})
            assert urls == [f"https://127.0.0.1:{prefill.port}{CHAT}", f"https://localhost:{decode.port}{CHAT}"]


async def test_prompts_are_in_no_span_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with (
        serving(says(b"CANARY", 400), says(b"CANARY"), prefilled(params=None), prefilled()) as prefill,
        serving(says({"CANARY": 1, "usage": {}}), says(b"CANARY", 500), dies) as decode,
        sidecar(decode) as proxy,
    ):
        for _ in range(5):
            await proxy.post(REQUEST, prefill=prefill.address)
        await proxy.post(b'{"CANARY')
        found = str(await proxy.spans(4 + 4 + 6 + 6 + 6 + 3))
    assert TRACE in found
    assert "CANARY" not in found
    assert "CANARY" not in caplog.text
