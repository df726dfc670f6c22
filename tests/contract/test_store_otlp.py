"""POST /v1/traces against the OTLP specification, section OTLP/HTTP."""

import base64
import gzip
import json
import logging
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.testclient import TestClient
from store_process import A, B, a_span

from llmtrace.traces.otlp import encode
from llmtrace.traces.store import database as module
from llmtrace.traces.store.app import create_app
from llmtrace.traces.store.database import Database
from llmtrace.traces.store.ingest import Limits

PROTOBUF, JSON = "application/x-protobuf", "application/json"
BODY = encode([a_span(A, 1), a_span(A, 2)]).SerializeToString()
LIMITS = Limits(compressed_bytes=10_000, body_bytes=50_000)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "traces.duckdb")
    yield database
    database.close()


@pytest.fixture
def client(database: Database) -> Iterator[TestClient]:
    with TestClient(create_app(database, LIMITS)) as client:
        yield client


def post(client: TestClient, body: bytes, content_type: str = PROTOBUF, **headers: str) -> "Answer":
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(client, body, {"Content-Type": content_type, **named})


class Answer:
    def __init__(self, client: TestClient, body: bytes, headers: dict[str, str]) -> None:
        response = client.post("/v1/traces", content=body, headers=headers)
        self.status = response.status_code
        self.headers = response.headers
        self.content = response.content

    def status_message(self) -> tuple[int, str]:
        """Code and message of the google.rpc.Status in the answer."""
        if self.headers["content-type"].startswith(JSON):
            document = json.loads(self.content)
            return document["code"], document["message"]
        assert self.headers["content-type"] == PROTOBUF
        assert (self.content[0], self.content[2]) == (0x08, 0x12)
        assert self.content[3] == len(self.content) - 4
        return self.content[1], self.content[4:].decode()


def as_json(body: bytes) -> bytes:
    document = json_format.MessageToDict(encode([]).FromString(body))
    for of_resource in document["resourceSpans"]:
        for span in of_resource["scopeSpans"][0]["spans"]:
            for name in {"traceId", "spanId", "parentSpanId"} & span.keys():
                span[name] = base64.b64decode(span[name]).hex()
    return json.dumps(document).encode()


def test_protobuf(client: TestClient, database: Database) -> None:
    answer = post(client, BODY)
    assert (answer.status, answer.headers["content-type"], answer.content) == (200, PROTOBUF, b"")
    assert database.trace(A) is not None


def test_json(client: TestClient, database: Database) -> None:
    answer = post(client, as_json(BODY), "application/json; charset=utf-8")
    assert (answer.status, answer.headers["content-type"]) == (200, JSON)
    assert json.loads(answer.content) == {}
    assert database.trace(A) is not None


@pytest.mark.parametrize("content_type", [PROTOBUF, JSON])
def test_gzip(client: TestClient, database: Database, content_type: str) -> None:
    body = BODY if content_type == PROTOBUF else as_json(BODY)
    members = gzip.compress(body[:10]) + gzip.compress(body[10:])
    assert post(client, members, content_type, Content_Encoding="gzip").status == 200
    assert database.trace(A) is not None


def test_empty_requests_are_fine(client: TestClient) -> None:
    assert post(client, b"").status == 200
    assert post(client, b"{}", JSON).status == 200


@pytest.mark.parametrize(
    ("body", "content_type", "encoding"),
    [
        (b"\xff\xff", PROTOBUF, "identity"),
        (BODY[:-3], PROTOBUF, "identity"),
        (b"{", JSON, "identity"),
        (b'{"resourceSpans": 1}', JSON, "identity"),
        (BODY, PROTOBUF, "gzip"),
        (gzip.compress(BODY)[:-9], PROTOBUF, "gzip"),
        (gzip.compress(BODY) + b"rubbish", PROTOBUF, "gzip"),
        (zlib.compress(BODY), PROTOBUF, "gzip"),
        (
            b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "secret", "spanId": "x"}]}]}]}',
            JSON,
            "identity",
        ),
    ],
)
def test_malformed(
    client: TestClient, caplog: pytest.LogCaptureFixture, body: bytes, content_type: str, encoding: str
) -> None:
    with caplog.at_level(logging.INFO, "llmtrace"):
        answer = post(client, body, content_type, Content_Encoding=encoding)
    assert answer.status == 400
    assert answer.headers["content-type"].startswith(content_type)
    code, message = answer.status_message()
    assert code == 3
    assert message
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


def test_invalid_spans_are_rejected_and_the_others_kept(client: TestClient, database: Database) -> None:
    body = encode([a_span(A, 1), a_span("0" * 32, 2), a_span("ab", 3), a_span(B, 4, span_id="")])
    answer = post(client, body.SerializeToString())
    assert answer.status == 200
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert partial.rejected_spans == 3
    assert partial.error_message.startswith("3 spans are invalid: ")
    assert database.trace(A) is not None
    assert database.trace(B) is None
    document = json.loads(post(client, as_json(body.SerializeToString()), JSON).content)
    assert document["partialSuccess"]["rejectedSpans"] == "3"


def test_too_large(client: TestClient) -> None:
    large = encode([a_span(A, 1, name="x" * 60_000)]).SerializeToString()
    answer = post(client, large)
    assert (answer.status, answer.status_message()[0]) == (413, 8)
    chunked = client.post("/v1/traces", content=iter([large]), headers={"Content-Type": PROTOBUF})
    assert chunked.status_code == 413
    bomb = gzip.compress(b"\0" * 5_000_000)
    assert len(bomb) < LIMITS.compressed_bytes
    assert post(client, bomb, Content_Encoding="gzip").status == 413
    noise = bytes(range(256)) * 50
    assert post(client, noise, Content_Encoding="gzip").status == 413


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/protobuf"])
def test_other_content_types(client: TestClient, content_type: str) -> None:
    assert post(client, BODY, content_type).status == 415


def test_other_encodings_and_methods(client: TestClient) -> None:
    assert post(client, BODY, Content_Encoding="br").status == 415
    for method in ("GET", "PUT", "DELETE"):
        assert client.request(method, "/v1/traces").status_code == 405


def test_a_full_queue_asks_to_come_back(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING_BYTES", 1)
    hold = threading.Event()
    insert = database._insert
    monkeypatch.setattr(database, "_insert", lambda batches: (hold.wait(10), insert(batches)))
    first = threading.Thread(target=post, args=(client, BODY))
    first.start()
    while not database._pending:
        pass
    answer = post(client, BODY)
    assert (answer.status, answer.status_message()[0]) == (503, 14)
    assert int(answer.headers["retry-after"]) > 0
    hold.set()
    first.join()
    assert post(client, BODY).status == 200


def test_a_commit_that_fails_is_not_acknowledged(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(database, "_insert", broken)
        assert post(client, BODY).status == 503
    assert database.trace(A) is None
    assert post(client, BODY).status == 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(body=st.binary(max_size=200), content_type=st.sampled_from([PROTOBUF, JSON]), packed=st.booleans())
def test_no_payload_breaks_it(client: TestClient, body: bytes, content_type: str, packed: bool) -> None:
    sent = gzip.compress(body) if packed else body
    answer = post(client, sent, content_type, Content_Encoding="gzip" if packed else "identity")
    assert answer.status in (200, 400)
    assert client.get("/ready").status_code == 200
