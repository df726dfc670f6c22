import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmtrace.errors import UserError
from llmtrace.traces.model import Span
from llmtrace.traces.otlp import encode
from llmtrace.traces.store.answers import trace_by_id_response
from llmtrace.traces.tempo import TempoClient, TraceSummary

ID = "0" * 30 + "ab"
TRACE = encode([Span(ID, "1" * 16, None, "x", "CLIENT", 1, 2)]).SerializeToString()


class Server(ThreadingHTTPServer):
    """Answers every request with the same."""

    status = 200
    body = b""
    delay = threading.Event()
    paths: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.status == 0:
            self.server.delay.wait(5)
        self.send_response(self.server.status or 200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.paths = []
        server.delay = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.delay.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: Server) -> TempoClient:
    return TempoClient(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=0.5)


def answer(server: Server, status: int, body: bytes = b"") -> None:
    server.status, server.body = status, body


def test_a_trace(server: Server, client: TempoClient) -> None:
    # metrics (2), status (3) and message (4) around the trace must not matter
    answer(server, 200, b"\x12\x02\x08\x05" + trace_by_id_response(TRACE) + b"\x18\x01\x22\x01x")
    trace = client.trace("ab")
    assert trace is not None
    assert trace.trace_id == ID
    assert [span.name for span in trace.spans] == ["x"]
    assert server.paths == ["/api/v2/traces/ab"]


@pytest.mark.parametrize(("status", "body"), [(404, b""), (200, b""), (200, b"\x0a\x00")])
def test_no_trace(server: Server, client: TempoClient, status: int, body: bytes) -> None:
    answer(server, status, body)
    assert client.trace(ID) is None


def test_search(server: Server, client: TempoClient) -> None:
    answer(
        server,
        200,
        b'{"traces": [{"traceID": "ab", "startTimeUnixNano": "5"}, {"traceID": "0CD", "rootServiceName": "s",'
        b' "rootTraceName": "r", "startTimeUnixNano": "7", "durationMs": 3, "spanSets": [{"matched": 2}]}]}',
    )
    found = client.search("{ }", start_s=1, end_s=2, limit=3)
    assert found == [
        TraceSummary("0" * 30 + "cd", "s", "r", 7, 3, 2),
        TraceSummary(ID, "", "", 5, 0, 0),
    ]
    assert "start=1&end=2&limit=3" in server.paths[0]


def test_tags_and_values(server: Server, client: TempoClient) -> None:
    answer(server, 200, b'{"scopes": [{"name": "span", "tags": ["b", "a"]}]}')
    assert client.tags("span") == ["a", "b"]
    answer(server, 200, b'{"tagValues": [{"type": "string", "value": "v"}]}')
    assert client.tag_values("span.a b", "{}") == ["v"]
    assert server.paths[1].startswith("/api/v2/search/tag/span.a%20b/values?")


@pytest.mark.parametrize("body", [b"\xff", b"garbage", b"[]", b"[" * 100_000, b'{"traces": 5}', b'{"traces": [1]}'])
def test_garbage_is_a_user_error(server: Server, client: TempoClient, body: bytes) -> None:
    answer(server, 200, body)
    with pytest.raises(UserError, match="did not answer as Tempo does"):
        client.search("{}", start_s=0, end_s=1, limit=1)


@pytest.mark.parametrize("body", [b"\xff", b"<html>", b"\x0a\x05x", b"\x0a\x02\xff\xff", b"\x0b"])
def test_a_garbled_trace_is_a_user_error(server: Server, client: TempoClient, body: bytes) -> None:
    answer(server, 200, body)
    with pytest.raises(UserError, match="did not answer as Tempo does"):
        client.trace(ID)


def test_http_errors(server: Server, client: TempoClient) -> None:
    answer(server, 400, b"invalid q\n")
    with pytest.raises(UserError, match=r"HTTP 400 \(invalid q\); correct the request"):
        client.search("{", start_s=0, end_s=1, limit=1)
    answer(server, 503)
    with pytest.raises(UserError, match="HTTP 503"):
        client.trace(ID)
    assert not client.ready()
    answer(server, 404)
    with pytest.raises(UserError, match="did not answer as Tempo does"):
        client.tags("span")


def test_timeout(server: Server, client: TempoClient) -> None:
    server.status = 0
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+ has not answered"):
        client.trace(ID)


def test_nothing_listens(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    client = TempoClient("http://127.0.0.1:1")
    assert TempoClient(url).ready()
    assert not client.ready()
    with pytest.raises(UserError, match="cannot be reached") as caught:
        client.trace(ID)
    assert "http://127.0.0.1:1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:99999", "http://a..b"])
def test_a_url_that_cannot_be_connected_to(url: str) -> None:
    with pytest.raises(UserError):
        TempoClient(url).trace(ID)


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://x", "http://", "127.0.0.1:13200"])
def test_no_url(url: str) -> None:
    with pytest.raises(UserError, match="no URL"):
        TempoClient(url)
