from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.semconv import attributes as a
from llmtrace.sidecar.spans import call_attributes, server_attributes
from llmtrace.sidecar.upstream import HOP_BY_HOP, address, passed_on, request_headers

names = st.sampled_from([b"accept", b"X-Custom", b"cookie", b"Connection", b"te", b"x-a", b"Keep-Alive", b"upgrade"])
headers = st.lists(st.tuples(names, st.sampled_from([b"", b"x", b"X-A, close", b"keep-alive", b"\xff"])), max_size=8)


@given(headers)
def test_a_proxy_passes_on_what_is_not_of_the_connection(given_: list[tuple[bytes, bytes]]) -> None:
    lower = [(name.lower(), value) for name, value in given_]
    named = {t.strip().lower() for n, v in lower if n == b"connection" for t in v.split(b",")}
    expected = [(n, v) for n, v in lower if n not in HOP_BY_HOP and n not in named]
    assert passed_on(given_, HOP_BY_HOP) == expected


def test_headers_of_a_request() -> None:
    came = [
        *((b"host", b"pod:8000"), (b"content-length", b"7"), (b"expect", b"100-continue")),
        *((b"transfer-encoding", b"chunked"), (b"te", b"trailers"), (b"authorization", b"Bearer x")),
        *((b"x-many", b"1"), (b"x-many", b"2"), (b"x-word", "schön".encode()), (b"x-old", b"sch\xf6n")),
        *((b"x-forwarded-for", b"10.0.0.1"), (b"x-route", b"r"), (b"connection", b"close, X-Gone"), (b"x-gone", b"1")),
    ]
    found = request_headers(came, "10.0.0.2", frozenset({b"x-route"}))
    assert list(found.items()) == [
        *(("host", "pod:8000"), ("authorization", "Bearer x"), ("x-many", "1"), ("x-many", "2")),
        *(("x-word", "schön"), ("x-old", "schön"), ("x-forwarded-for", "10.0.0.1, 10.0.0.2")),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("pod-0.ns.svc:8000", "pod-0.ns.svc:8000"),
        ("[::1]:8000", "[::1]:8000"),
        ("host", "host"),
    ],
)
def test_addresses(text: str, found: str) -> None:
    assert address(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", ":8000", "a:b", "a:99999", "a:8000/x", "u@a:8000", "u:p@a:8000", "a:8000@b:80", "a,b", "a b", "::1"),
        *("https://a:1", "a:8000?x", "a:8000#x", "a\n:1", "ä:1", "a:\u0661"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="no host and port"):
        address(text)


@pytest.mark.parametrize(
    ("host", "scheme", "expected"),
    [
        ("localhost:8080", "http", {a.SERVER_ADDRESS: "localhost", a.SERVER_PORT: 8080}),
        ("localhost", "http", {a.SERVER_ADDRESS: "localhost"}),
        ("localhost:80", "http", {a.SERVER_ADDRESS: "localhost"}),
        ("localhost:80", "https", {a.SERVER_ADDRESS: "localhost", a.SERVER_PORT: 80}),
        ("localhost:443", "https", {a.SERVER_ADDRESS: "localhost"}),
        ("[::1]:8080", "http", {a.SERVER_ADDRESS: "::1", a.SERVER_PORT: 8080}),
        ("[::1]", "http", {a.SERVER_ADDRESS: "::1"}),
        ("", "http", {a.SERVER_ADDRESS: ""}),
        ("x:y", "http", {a.SERVER_ADDRESS: "x:y"}),
    ],
)
def test_server_address_and_port(host: str, scheme: str, expected: dict[str, object]) -> None:
    found = call_attributes("POST", f"{scheme}://{host}/v1/completions?x=/:1")
    assert {k: v for k, v in found.items() if k.startswith("server.")} == expected


def test_attributes_of_a_request() -> None:
    scope = {"scheme": "http", "method": "BREW", "path": "/ä", "http_version": "1.1", "client": ("10.0.0.2", 5)}
    found = server_attributes(scope, {"host": "h:1", "user-agent": "curl", "x-forwarded-for": "10.9.9.9, 10.0.0.3"})
    assert found == {
        a.HTTP_METHOD: "_OTHER",
        a.HTTP_METHOD_ORIGINAL: "BREW",
        a.URL_SCHEME: "http",
        a.URL_PATH: "/ä",
        a.PROTOCOL_VERSION: "1.1",
        a.SERVER_ADDRESS: "h",
        a.SERVER_PORT: 1,
        a.PEER_ADDRESS: "10.0.0.2",
        a.PEER_PORT: 5,
        a.CLIENT_ADDRESS: "10.9.9.9",
        a.USER_AGENT: "curl",
    }


def test_attributes_of_a_request_that_says_nothing() -> None:
    scope = {"scheme": "https", "method": "GET", "path": "/", "http_version": "1.0", "client": None}
    found = server_attributes(scope, {})
    assert set(found) == {a.HTTP_METHOD, a.URL_SCHEME, a.URL_PATH, a.PROTOCOL_VERSION, a.SERVER_ADDRESS}
