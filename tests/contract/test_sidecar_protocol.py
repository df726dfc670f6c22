"""The sidecar against llm-d's own (v0.10): what goes to which server, what comes back, and its trace.

Sources, by row: llm-d-router, pkg/sidecar/proxy/*_test.go and the code that they test; the traces were recorded from
llm-d's sidecar behind its endpoint picker.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from sidecaring import (
    CHAT,
    DECODED,
    PARAMS,
    PARENT,
    TRACE,
    TRACEPARENT,
    Sidecar,
    chunked,
    prefilled,
    says,
    serving,
    sidecar,
)

from llmtrace.traces.model import Span

PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass
class Row:
    """A request, and its prefill leg's body less the params, which are always the same."""

    name: str
    request: dict[str, Any]
    prefill: dict[str, Any]
    path: str = CHAT
    params: dict[str, Any] | None = field(default_factory=lambda: PARAMS)


# handleNIXLV2, tokenLimitFieldsForAPIType, tokenLimitMap; connector_nixlv2_test.go
ROWS = [
    Row(
        "limits are capped and come back",
        {"model": "m", "messages": MESSAGES, "max_tokens": 100, "min_tokens": 5},
        {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "stream": False,
        },
    ),
    Row(
        "limits that are not there are capped, and are not there again",
        {"model": "m", "messages": MESSAGES},
        {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "stream": False,
        },
    ),
    Row(
        "a stream is none for the prefill server",
        {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "n": 2},
        {
            "model": "m",
            "messages": MESSAGES,
            "n": 2,
            "stream": False,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
        },
    ),
    Row(
        "a client's own params are replaced",
        {"model": "m", "messages": MESSAGES, "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"}},
        {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "stream": False,
        },
    ),
    Row(
        "completions",
        {"model": "m", "prompt": "Hello", "max_tokens": 100, "temperature": 0.5},
        {
            "model": "m",
            "prompt": "Hello",
            "temperature": 0.5,
            "stream": False,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
        },
        "/v1/completions",
    ),
    Row(
        "messages",
        {"model": "m", "messages": MESSAGES, "max_tokens": 50},
        {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "stream": False,
        },
        "/v1/messages",
    ),
    Row(
        "responses",
        {"model": "m", "input": "Tell me", "max_output_tokens": 100, "max_tokens": 9},
        {"model": "m", "input": "Tell me", "max_output_tokens": 1, "max_tokens": 9, "stream": False},
        "/v1/responses",
    ),
    Row(
        "generate",
        {"token_ids": [1, 2], "sampling_params": {"max_tokens": 100, "seed": 9007199254740993}},
        {
            "token_ids": [1, 2],
            "sampling_params": {"max_tokens": 1, "min_tokens": 1, "seed": 9007199254740993},
            "stream": False,
        },
        "/inference/v1/generate",
    ),
    Row(
        "generate without sampling_params",
        {"token_ids": [1, 2]},
        {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1, "min_tokens": 1}, "stream": False},
        "/inference/v1/generate",
    ),
    Row(
        "a prefill server without a connector",
        {"model": "m", "messages": MESSAGES, "max_completion_tokens": 9},
        {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "stream": False,
        },
        params=None,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_the_two_legs(row: Row) -> None:
    async with (
        serving(prefilled(params=row.params)) as prefill,
        serving(says(DECODED)) as decode,
        sidecar(decode) as proxy,
    ):
        response = await proxy.post(row.request, f"{row.path}?x=%2F1", prefill.address, authorization="Bearer k")
    assert response.status_code == 200
    (first,), (second,) = prefill.requests, decode.requests
    assert first.json == {**row.prefill, "kv_transfer_params": PREFILL_PARAMS}
    assert second.json == {**row.request, "kv_transfer_params": row.params}
    for leg in (first, second):
        assert (leg.method, leg.target) == ("POST", f"{row.path}?x=%2F1")
        assert (leg.get("authorization"), leg.get("content-type")) == ("Bearer k", "application/json")
        assert (leg.get("host"), leg.get("x-forwarded-for")) == (f"127.0.0.1:{proxy.port}", "127.0.0.1")
        assert leg.get("x-prefiller-host-port") is None
        assert leg.get("content-length") == str(len(leg.body))
        assert leg.get("transfer-encoding") is None
    assert first.get("x-request-id") == second.get("x-request-id")


async def test_a_clients_request_id_is_that_of_both_legs() -> None:
    """llm-d's sidecar adds a second x-request-id; vLLM takes the first, which is the client's."""
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        await proxy.post({}, prefill=prefill.address, x_request_id="r-1")
        await proxy.post({}, prefill=prefill.address)
    assert [prefill.requests[0].get("x-request-id"), decode.requests[0].get("x-request-id")] == ["r-1", "r-1"]
    made = prefill.requests[1].get("x-request-id")
    assert made
    assert made != "r-1"
    assert decode.requests[1].get("x-request-id") == made


# testPrefillHeaderRouting of chat_completions_test.go
@pytest.mark.parametrize(
    ("values", "sampling", "targets"),
    [
        ([], False, None),
        ([""], False, None),
        (["", ""], True, None),
        (["a"], False, {"a"}),
        (["a,b"], False, {"a"}),
        (["a , b"], True, {"a", "b"}),
        (["a", "b"], False, {"a"}),
        (["a", "b"], True, {"a", "b"}),
        (["http://a"], False, {"a"}),
    ],
)
async def test_the_prefill_server_is_one_of_those_named(
    values: list[str], sampling: bool, targets: set[str] | None
) -> None:
    async with (
        serving(prefilled()) as a,
        serving(prefilled()) as b,
        serving(says(DECODED)) as decode,
        sidecar(decode, prefiller_sampling=sampling) as proxy,
    ):
        named = {"a": a, "b": b}
        headers = [("x-prefiller-host-port", value.replace("a", a.address).replace("b", b.address)) for value in values]
        for _ in range(60 if sampling and targets else 1):
            response = await proxy.client.post(CHAT, json={"model": "m"}, headers=headers)
            assert response.status_code == 200
    assert {name for name, server in named.items() if server.requests} == (targets or set())
    assert all(seen.get("x-prefiller-host-port") is None for seen in decode.requests)
    assert ("kv_transfer_params" in decode.requests[0].json) is (targets is not None)


async def test_headers_for_the_sidecar_go_no_further() -> None:
    """Without an encode stage and without P2P pulls, their headers are dropped (disaggregatedPrefillHandler)."""
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        await proxy.post({}, x_encoder_hosts_ports="e:1", x_kv_cache_source_host_port="k:1", x_other="1")
    (seen,) = decode.requests
    assert (seen.get("x-encoder-hosts-ports"), seen.get("x-kv-cache-source-host-port")) == (None, None)
    assert (seen.get("x-other"), seen.body) == ("1", b"{}")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *(("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/embeddings"), ("POST", "/score")),
        *(
            ("GET", "/healthz"),
            ("DELETE", "/a%20b/../c?d=e&f=%20"),
            ("OPTIONS", "/v1/x"),
            ("GET", CHAT),
            ("PUT", "//x"),
        ),
        ("POST", "/health"),
    ],
)
async def test_any_other_request_goes_to_the_decode_server_as_it_is(method: str, target: str) -> None:
    answer = says(b"\x00\xff", 207, "application/x", {"x-one": "1", "keep-alive": "timeout=5"})
    async with serving(prefilled()) as prefill, serving(answer) as decode, sidecar(decode) as proxy:
        body = b"" if method == "GET" else b"\xff{"
        head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nx-prefiller-host-port: {prefill.address}\r\n"
        status, headers, content = await raw(proxy, head, body)
    assert (status, content, headers["x-one"], headers["content-type"]) == (207, b"\x00\xff", "1", "application/x")
    assert "keep-alive" not in headers
    (seen,) = decode.requests
    assert (seen.method, seen.target, seen.body, prefill.requests) == (method, target, body, [])


async def raw(proxy: Sidecar, head: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """A request as it is written, and status, headers and body of the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    found = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in found[1:-2])
    content = await reader.readexactly(int(headers["content-length"]))
    writer.close()
    return int(found[0].split(" ")[1]), headers, content


async def test_health_is_the_sidecars_own() -> None:
    """createRoutes of proxy.go: 200 without asking the decode server."""
    async with serving(says(status=500)) as decode, sidecar(decode) as proxy:
        for method in ("GET", "HEAD"):
            response = await proxy.client.request(method, "/health")
            assert (response.status_code, response.content) == (200, b"")
        assert decode.requests == []


async def test_head_has_no_body() -> None:
    async def answer(_: object, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n")

    async with serving(answer) as decode, sidecar(decode) as proxy:
        response = await proxy.client.head("/v1/models")
    assert (response.status_code, response.headers["content-length"], response.content) == (200, "7", b"")


# connector_nixlv2_test.go: cached tokens
@pytest.mark.parametrize(
    ("cached", "usage", "details"),
    [
        (7, {"prompt_tokens": 64, "prompt_tokens_details": {"cached_tokens": 49}}, {"cached_tokens": 7}),
        (
            7,
            {"prompt_tokens": 64, "prompt_tokens_details": {"audio_tokens": 1}},
            {"audio_tokens": 1, "cached_tokens": 7},
        ),
        (7, {"prompt_tokens": 64}, {"cached_tokens": 7}),
        (7, {"prompt_tokens": 64, "prompt_tokens_details": None}, {"cached_tokens": 7}),
        (None, {"prompt_tokens": 64, "prompt_tokens_details": {"cached_tokens": 49}}, {"cached_tokens": 0}),
        (0, {"prompt_tokens": 64, "prompt_tokens_details": {"cached_tokens": 49}}, {"cached_tokens": 0}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_those_of_the_prefill_server(
    cached: int | None, usage: dict[str, Any], details: dict[str, int], stream: bool
) -> None:
    whole = {"id": "x", "choices": [], "usage": usage}
    text = b'data: {"choices": [{"delta": {"content": "hello"}}]}\n\n'
    event = f"data: {json.dumps(whole)}\n\ndata: [DONE]\n\n".encode()

    async def events(_: object, writer: Any) -> None:
        writer.write(chunked(text, event[:30], event[30:]) + b"0\r\n\r\n")

    async with (
        serving(prefilled(cached)) as prefill,
        serving(events if stream else says(whole)) as decode,
        sidecar(decode) as proxy,
    ):
        response = await proxy.post({"stream": stream}, prefill=prefill.address)
        unified = await proxy.post({"stream": stream})
    expected = {**whole, "usage": {**usage, "prompt_tokens_details": details}}
    if stream:
        lines = response.content.split(b"\n")
        assert response.content.startswith(text)
        assert json.loads(lines[2].removeprefix(b"data: ")) == expected
        assert lines[3:] == [b"", b"data: [DONE]", b"", b""]
        assert unified.content == text + event
    else:
        assert response.json() == expected
        assert response.headers["content-length"] == str(len(response.content))
        assert unified.json() == whole


async def test_data_parallel_ranks() -> None:
    """startDataParallel, dataParallelHandler of data_parallel.go: a port for each rank, and the deprecated header."""
    port, decode_port = two_ports(), two_ports()
    async with (
        serving(says({"rank": 0}), port=decode_port) as first,
        serving(says({"rank": 1}), port=decode_port + 1),
        serving(prefilled()) as prefill,
        sidecar(first, port=port, data_parallel_size=2, pod_ip="10.0.0.7") as proxy,
    ):
        base = f"http://127.0.0.1:{proxy.port + 1}{CHAT}"
        rank_1 = {"x-data-parallel-host-port": f"10.0.0.7:{proxy.port + 1}"}
        assert (await proxy.client.post(CHAT, json={})).json() == {"rank": 0}
        assert (await proxy.client.post(base, json={})).json() == {"rank": 1}
        assert (await proxy.client.post(CHAT, json={}, headers=rank_1)).json() == {"rank": 1}
        wrong = {"x-data-parallel-host-port": "10.0.0.8:1"}
        response = await proxy.client.post(CHAT, json={}, headers=wrong)
        assert (response.status_code, response.content) == (400, b"")
        assert (await proxy.client.post(base, json={}, headers=wrong)).json() == {"rank": 1}
        response = await proxy.post({}, prefill=prefill.address, **rank_1)
        assert response.json() == {"rank": 1}
        (leg,) = [span for span in proxy.memory.spans() if span.name == "decode"]
        assert leg.attributes["llm_d.pd_proxy.decode.data_parallel"] is True
        assert "llm_d.pd_proxy.decode.target" not in leg.attributes


def two_ports() -> int:
    """The first of two free ports that follow each other."""
    while True:
        port = free_port()
        with socket.socket() as next_one:
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


# (name, parent, kind, scope, attributes that are the same whoever asks, names of the others)
SCOPE = "llm-d-router/pkg/sidecar/proxy"
HTTP_NAMES = {
    *(
        "server.address",
        "http.request.method",
        "url.scheme",
        "server.port",
        "network.peer.address",
        "network.peer.port",
    ),
    *("user_agent.original", "client.address", "url.path", "network.protocol.version", "http.request.body.size"),
    *("http.response.body.size", "http.response.status_code"),
}
CALL_NAMES = {
    *("http.request.method", "url.full", "server.address", "server.port", "network.protocol.version"),
    "http.response.status_code",
}
FORWARD: dict[str, Any] = {
    "llm_d.pd_proxy.connector": "nixlv2",
    "llm_d.pd_proxy.kv_connector": "nixlv2",
    "llm_d.pd_proxy.ec_connector": "",
    "llm_d.pd_proxy.request_path": CHAT,
    "llm_d.openai.api": "chat_completions",
}
ROOT = f"llm_d.pd_proxy.POST {CHAT}"


def recorded(split: bool, prefill: str, decode: str) -> list[tuple[str, str | None, str, str | None, dict[str, Any]]]:
    """The trace of llm-d's sidecar, in which only ``decode`` hangs elsewhere: under ``prefill``, which ended before."""
    root = (ROOT, None, "SERVER", None, {"url.path": CHAT, "url.scheme": "http", "http.response.status_code": 200})
    call = {"http.request.method": "POST", "network.protocol.version": "1.1", "http.response.status_code": 200}
    decoding = {**call, "url.full": f"http://{decode}{CHAT}", "server.address": "localhost"}
    if not split:
        reason = {"llm_d.pd_proxy.disaggregation_used": False, "llm_d.pd_proxy.reason": "no_prefill_header"}
        return [
            root,
            ("forward_request", ROOT, "SERVER", SCOPE, {**FORWARD, **reason}),
            ("HTTP POST", "forward_request", "CLIENT", None, decoding),
        ]
    used = {
        "llm_d.pd_proxy.disaggregation_used": True,
        "llm_d.pd_proxy.prefill_target": prefill,
        "llm_d.pd_proxy.prefill_candidates": 1,
    }
    prefilling = {**call, "url.full": f"http://{prefill}{CHAT}", "server.address": "127.0.0.1"}
    first = {
        "llm_d.pd_proxy.request_id": "r-1",
        "llm_d.pd_proxy.prefill_target": prefill,
        "llm_d.pd_proxy.connector": "nixlv2",
        "llm_d.pd_proxy.prefill.status_code": 200,
    }
    second = {
        "llm_d.pd_proxy.request_id": "r-1",
        "llm_d.pd_proxy.connector": "nixlv2",
        "llm_d.pd_proxy.decode.streaming": False,
        "llm_d.pd_proxy.decode.data_parallel": False,
        "llm_d.pd_proxy.decode.target": decode,
    }
    return [
        root,
        ("forward_request", ROOT, "SERVER", SCOPE, {**FORWARD, **used}),
        ("prefill", "forward_request", "INTERNAL", SCOPE, first),
        ("HTTP POST", "prefill", "CLIENT", None, prefilling),
        ("decode", "forward_request", "INTERNAL", SCOPE, second),
        ("HTTP POST", "decode", "CLIENT", None, decoding),
    ]


MEASURED = {
    ROOT: HTTP_NAMES,
    "prefill": {"llm_d.pd_proxy.prefill.duration_ms"},
    "decode": {
        *("llm_d.pd_proxy.decode.duration_ms", "llm_d.pd_proxy.total_duration_ms", "llm_d.pd_proxy.true_ttft_ms"),
        *("llm_d.pd_proxy.prefill_duration_ms", "llm_d.pd_proxy.decode_duration_ms"),
        "llm_d.pd_proxy.coordinator_overhead_ms",
    },
    "HTTP POST": CALL_NAMES,
}


@pytest.mark.parametrize("split", [True, False])
async def test_spans_are_those_of_llm_d(split: bool) -> None:
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        await proxy.post({"model": "m"}, prefill=prefill.address if split else None, x_request_id="r-1")
        spans = await proxy.spans(6 if split else 3)
    by_id = {span.span_id: span for span in spans}

    def parent(span: Span) -> str | None:
        return None if span.parent_id == PARENT else by_id[str(span.parent_id)].name

    found = {(span.name, parent(span)): span for span in spans}
    expected = recorded(split, prefill.address, f"localhost:{decode.port}")
    assert set(found) == {(name, above) for name, above, *_ in expected}
    for name, above, kind, scope, attributes in expected:
        span = found[name, above]
        assert (span.trace_id, span.kind, span.status) == (TRACE, kind, "UNSET"), name
        assert scope is None or span.scope == scope
        names = attributes.keys() | MEASURED.get(name, set())
        assert set(span.attributes) == names, name
        assert attributes.items() <= dict(span.attributes).items(), name
    for seen, above in ((prefill, "prefill"), (decode, "decode" if split else "forward_request")):
        if seen.requests:
            call = found["HTTP POST", above]
            assert seen.requests[0].get("traceparent") == f"00-{TRACE}-{call.span_id}-01"


async def test_the_legs_follow_each_other_and_their_times_add_up() -> None:
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        await proxy.post({}, prefill=prefill.address)
        spans = {(s.name, str(s.attributes.get("url.full"))[-4:]): s for s in await proxy.spans(6)}
    named = {name: span for (name, _), span in spans.items()}
    root, forward, first, second = (named[name] for name in (ROOT, "forward_request", "prefill", "decode"))
    times = (root, forward, first)
    assert all(outer.start_ns <= inner.start_ns and inner.end_ns <= outer.end_ns for outer, inner in pairwise(times))
    assert first.end_ns <= second.start_ns <= second.end_ns <= forward.end_ns
    ms = {key.removeprefix("llm_d.pd_proxy."): value for key, value in second.attributes.items() if "_ms" in key}
    assert ms["prefill_duration_ms"] == first.attributes["llm_d.pd_proxy.prefill.duration_ms"]
    assert ms["decode_duration_ms"] == ms["decode.duration_ms"]
    assert ms["true_ttft_ms"] >= ms["prefill_duration_ms"] + ms["coordinator_overhead_ms"]  # type: ignore[operator]
    assert ms["total_duration_ms"] == pytest.approx(ms["true_ttft_ms"] + ms["decode_duration_ms"])  # type: ignore[operator]


async def test_the_trace_state_goes_on() -> None:
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        await proxy.post({}, prefill=prefill.address, tracestate="v=1", baggage="b=2")
    for (seen,) in (prefill.requests, decode.requests):
        assert (seen.get("tracestate"), seen.get("baggage")) == ("v=1", "b=2")


@pytest.mark.parametrize("split", [False, True])
async def test_a_request_that_is_not_sampled_leaves_no_span_and_its_context_goes_on(split: bool) -> None:
    unsampled = f"{TRACEPARENT[:-2]}00"
    async with serving(prefilled()) as prefill, serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        response = await proxy.post({}, prefill=prefill.address if split else None, traceparent=unsampled)
        assert response.status_code == 200
        assert await proxy.spans(0) == []
    assert {seen.get("traceparent") for seen in [*prefill.requests, *decode.requests]} == {unsampled}


async def test_requests_without_context() -> None:
    """An inference request begins a trace; a scrape or a health check begins none."""
    async with serving(says(DECODED)) as decode, sidecar(decode) as proxy:
        for path in ("/metrics", "/health", "/v1/models"):
            await proxy.client.get(path)
        assert await proxy.spans(0) == []
        await proxy.client.get("/metrics", headers={"traceparent": TRACEPARENT})
        call, root = await proxy.spans(2)
        assert (root.name, root.parent_id, root.kind) == ("llm_d.pd_proxy.GET /metrics", PARENT, "SERVER")
        assert (call.name, call.parent_id, call.kind) == ("HTTP GET", root.span_id, "CLIENT")
        proxy.memory.ended.clear()
        await proxy.client.post(CHAT, json={})
        *_, last = sorted(await proxy.spans(3), key=lambda span: span.end_ns)
        assert (last.name, last.parent_id) == (ROOT, None)
