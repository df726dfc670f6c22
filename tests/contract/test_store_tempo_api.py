"""The store's answers against Tempo's HTTP API."""

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from loopback import free_port
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from starlette.testclient import TestClient
from store_process import NOW_S, A, B, a_span, start

from llmtrace.traces.model import Trace
from llmtrace.traces.otlp import encode
from llmtrace.traces.store.app import create_app
from llmtrace.traces.store.database import Database
from llmtrace.traces.tempo import TempoClient, TraceSummary

HEADERS = {"Content-Type": "application/x-protobuf"}
ACCEPT = {"Accept": "application/protobuf"}
SPANS = [a_span(A, 1), a_span(A, 2), a_span(B, 3, status="OK", attributes={"a b": 1.5, "flag": True})]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    database = Database(tmp_path_factory.mktemp("store") / "traces.duckdb")
    with TestClient(create_app(database)) as client:
        client.post("/v1/traces", content=encode(SPANS).SerializeToString(), headers=HEADERS).raise_for_status()
        yield client
    database.close()


def test_status(client: TestClient) -> None:
    assert client.get("/ready").text == "ready\n"
    assert client.get("/api/echo").text == "echo"
    assert client.get("/api/status/buildinfo").json()["version"]


def test_trace_v2(client: TestClient) -> None:
    response = client.get(f"/api/v2/traces/{A}", headers=ACCEPT)
    assert response.headers["content-type"] == "application/protobuf"
    assert response.content[0] == 0x0A
    document = client.get(f"/api/v2/traces/{A.upper()}").json()
    (of_resource,) = document["trace"]["resourceSpans"]
    span = of_resource["scopeSpans"][0]["spans"][1]
    assert base64.b64decode(span["traceId"]).hex() == A
    assert base64.b64decode(span["spanId"]).hex() == SPANS[1].span_id
    assert span["kind"] == "SPAN_KIND_SERVER"
    assert span["status"] == {"code": "STATUS_CODE_ERROR"}
    assert span["startTimeUnixNano"] == str(SPANS[1].start_ns)


def test_trace_v1(client: TestClient) -> None:
    data = TracesData.FromString(client.get(f"/api/traces/{A}", headers=ACCEPT).content)
    assert len(data.resource_spans[0].scope_spans[0].spans) == 2
    assert list(client.get(f"/api/traces/{A}").json()) == ["batches"]


@pytest.mark.parametrize("version", ["", "v2/"])
def test_unknown_and_impossible_traces(client: TestClient, version: str) -> None:
    response = client.get(f"/api/{version}traces/{'c' * 32}")
    assert (response.status_code, response.content) == (404, b"")
    assert client.get(f"/api/{version}traces/b").status_code == 200
    for wrong in ("xyz", "a" * 33, "%20"):
        assert client.get(f"/api/{version}traces/{wrong}").status_code == 400


def test_search(client: TestClient) -> None:
    document = client.get("/api/search", params={"q": '{ span.run.id = "r1" }', "limit": "5"}).json()
    (trace,) = document["traces"]
    assert trace["traceID"] == A
    assert (trace["rootServiceName"], trace["rootTraceName"]) == ("gateway", "span 1")
    assert trace["startTimeUnixNano"] == str(SPANS[0].start_ns)
    assert trace["durationMs"] == 4
    assert trace["spanSets"] == [trace["spanSet"]]
    assert trace["spanSet"]["matched"] == 2
    span = next(s for s in trace["spanSet"]["spans"] if s["spanID"] == SPANS[1].span_id)
    assert span == {
        "spanID": SPANS[1].span_id,
        "name": "span 2",
        "startTimeUnixNano": str(SPANS[1].start_ns),
        "durationNanos": str(SPANS[1].end_ns - SPANS[1].start_ns),
        "attributes": [{"key": "run.id", "value": {"stringValue": "r1"}}],
    }
    assert document["metrics"] == {}


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({}, [B, A]),
        ({"limit": "1"}, [B]),
        ({"q": "{ span.flag }"}, [B]),
        ({"q": "{ status = error }"}, [A]),
        ({"start": str(NOW_S + 10), "end": str(NOW_S + 20)}, []),
        ({"start": str(NOW_S), "end": str(NOW_S)}, [B, A]),
        ({"tags": "run.id=r1"}, [A]),
        ({"tags": 'name="span 3" service.name=gateway'}, [B]),
        ({"tags": "error=true"}, [A]),
        ({"tags": "n=2"}, [A]),
        ({"minDuration": "4ms", "maxDuration": "5ms"}, [B, A]),
        ({"minDuration": "1s"}, []),
    ],
)
def test_search_parameters(client: TestClient, parameters: dict[str, str], found: list[str]) -> None:
    document = client.get("/api/search", params=parameters).json()
    assert [trace["traceID"] for trace in document["traces"]] == found


def test_spans_per_set(client: TestClient) -> None:
    (_, trace) = client.get("/api/search", params={"spss": "1"}).json()["traces"]
    assert len(trace["spanSet"]["spans"]) == 1
    assert trace["spanSet"]["matched"] == 2


@pytest.mark.parametrize(
    "parameters",
    [
        {"q": "{"},
        {"q": "{} | rate()"},
        {"limit": "0"},
        {"limit": "-1"},
        {"limit": "many"},
        {"limit": "٣"},
        {"spss": "x"},
        {"start": "1.5"},
        {"start": "20", "end": "10"},
        {"end": "99999999999999999999"},
        {"minDuration": "5"},
        {"tags": "x"},
        {"tags": 'x="unclosed'},
        {"tags": "a=b", "q": "{}"},
        {"q": "{ " + "(" * 2000},
    ],
)
def test_bad_parameters(client: TestClient, parameters: dict[str, str]) -> None:
    response = client.get("/api/search", params=parameters)
    assert response.status_code == 400
    assert len(response.text.strip().splitlines()) == 1


def test_tags(client: TestClient) -> None:
    names = client.get("/api/search/tags").json()["tagNames"]
    assert names == ["a b", "flag", "n", "run.id", "service.name"]
    scopes = {s["name"]: s["tags"] for s in client.get("/api/v2/search/tags").json()["scopes"]}
    assert scopes["resource"] == ["service.name"]
    assert scopes["span"] == ["a b", "flag", "n", "run.id"]
    assert "rootName" in scopes["intrinsic"]
    (only,) = client.get("/api/v2/search/tags", params={"scope": "span"}).json()["scopes"]
    assert only["name"] == "span"


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("span.n", [("int", "1"), ("int", "2")]),
        ("span.a b", [("float", "1.5")]),
        (".flag", [("bool", "true")]),
        ("resource.service.name", [("string", "gateway")]),
        ("status", [("keyword", "error"), ("keyword", "ok")]),
        ("rootName", [("string", "span 1")]),
        ("rootServiceName", [("string", "gateway")]),
        ("duration", []),
        ("name", [("string", "span 1"), ("string", "span 2"), ("string", "span 3")]),
        ("span.none", []),
    ],
)
def test_tag_values(client: TestClient, tag: str, values: list[tuple[str, str]]) -> None:
    found = client.get(f"/api/v2/search/tag/{tag}/values").json()["tagValues"]
    assert [(value["type"], value["value"]) for value in found] == values


def test_tag_values_without_scope(client: TestClient) -> None:
    assert client.get("/api/search/tag/service.name/values").json()["tagValues"] == ["gateway"]
    parameters = {"q": "{ status = ok }"}
    found = client.get("/api/v2/search/tag/name/values", params=parameters).json()["tagValues"]
    assert [value["value"] for value in found] == ["span 3"]
    assert client.get("/api/v2/search/tag/nonsense/values").status_code == 400
    assert client.get("/api/v2/search/tag/name/values", params={"q": "{"}).status_code == 400


def test_the_client_reads_the_store(tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path / "traces.duckdb", port)
    url = f"http://127.0.0.1:{port}"
    try:
        body = encode(SPANS).SerializeToString()
        httpx.post(f"{url}/v1/traces", content=body, headers=HEADERS).raise_for_status()
        with TempoClient(url) as client:
            assert client.ready()
            assert client.trace(A) == Trace(A, tuple(SPANS[:2]))
            assert client.trace("b") == Trace(B, (SPANS[2],))
            assert client.trace("c" * 32) is None
            found = client.search('{ span.run.id = "r1" }', start_s=NOW_S, end_s=NOW_S + 1, limit=5000)
            assert found == [TraceSummary(A, "gateway", "span 1", SPANS[0].start_ns, 4, 2)]
            assert client.tags("resource") == ["service.name"]
            assert client.tag_values("span.run.id") == ["r1"]
            assert client.trace(A) is not None
    finally:
        process.terminate()
        assert process.wait(20) == 0
