import base64
import json

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from llmtrace.traces.model import AttributeValue, Event, Link, Span
from llmtrace.traces.otlp import (
    JSON,
    KINDS,
    PROTOBUF,
    STATUSES,
    MalformedError,
    decode_trace,
    encode,
    parse_request,
    spans,
)

TIMES = st.integers(0, 2**64 - 1)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES: st.SearchStrategy[AttributeValue] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ATTRIBUTES = st.dictionaries(st.text(), VALUES, max_size=4)


def ids(size: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=size, max_size=size).filter(any).map(bytes.hex)


SPANS = st.builds(
    Span,
    trace_id=ids(16),
    span_id=ids(8),
    parent_id=st.none() | ids(8),
    name=st.text(),
    kind=st.sampled_from(KINDS),
    start_ns=TIMES,
    end_ns=TIMES,
    status=st.sampled_from(STATUSES),
    status_message=st.text(),
    attributes=ATTRIBUTES,
    resource=ATTRIBUTES,
    scope=st.text(),
    events=st.lists(st.builds(Event, st.text(), TIMES, ATTRIBUTES), max_size=2).map(tuple),
    links=st.lists(st.builds(Link, ids(16), ids(8), ATTRIBUTES), max_size=2).map(tuple),
)


@given(st.lists(SPANS, max_size=4))
def test_spans_survive_protobuf(found: list[Span]) -> None:
    body = encode(found).SerializeToString()
    assert list(spans(parse_request(body, PROTOBUF).resource_spans)) == found


@given(st.lists(SPANS, max_size=3))
def test_spans_survive_json(found: list[Span]) -> None:
    body = json.dumps(hexed(json_format.MessageToDict(encode(found)))).encode()
    assert list(spans(parse_request(body, JSON).resource_spans)) == found


def hexed(document: object) -> object:
    if isinstance(document, list):
        return [hexed(item) for item in document]
    if not isinstance(document, dict):
        return document
    names = ("traceId", "spanId", "parentSpanId")
    return {k: base64.b64decode(v).hex() if k in names else hexed(v) for k, v in document.items()}


def test_json_as_the_specification_allows_it() -> None:
    span = {
        "traceId": "5B8EFFF798038103D269B633813FC60C",
        "spanId": "EEE19B7EC3C1B174",
        "name": "s",
        "kind": "SPAN_KIND_SERVER",
        "startTimeUnixNano": 5,
        "endTimeUnixNano": "9007199254740993",
        "status": {"code": 2},
        "later": {"unknown": []},
        "attributes": [{"key": "i", "value": {"intValue": "9007199254740993"}}],
    }
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}], "new": 1}).encode()
    (found,) = spans(parse_request(body, JSON).resource_spans)
    assert (found.trace_id, found.span_id) == ("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert (found.kind, found.status, found.end_ns) == ("SERVER", "ERROR", 9007199254740993)
    assert found.attributes == {"i": 9007199254740993}
    assert found.parent_id is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"resourceSpans": 5}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": 5}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": 5}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"links": [{"spanId": "z"}]}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": "-1"}]}]}]}',
    ],
)
def test_malformed_json(body: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_request(body, JSON)
    assert "\n" not in str(caught.value)


@given(st.binary())
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    for content_type in (PROTOBUF, JSON):
        try:
            assert isinstance(parse_request(body, content_type), ExportTraceServiceRequest)
        except MalformedError as error:
            assert str(error)  # noqa: PT017


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["resourceSpans", "scopeSpans", "spans", "traceId", "attributes", "key", "value", "links"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_parsed_or_refused(document: object) -> None:
    try:
        parse_request(json.dumps(document).encode(), JSON)
    except MalformedError as error:
        assert str(error)  # noqa: PT017


def test_identical_spans_are_one_and_different_ones_of_an_id_are_two() -> None:
    one = Span("a" * 32, "1" * 16, None, "x", "CLIENT", 1, 2)
    other = Span("a" * 32, "1" * 16, None, "y", "CLIENT", 1, 2)
    trace = decode_trace("a" * 32, encode([one, other, one]).SerializeToString())
    assert trace is not None
    assert sorted(span.name for span in trace.spans) == ["x", "y"]


def test_bytes_that_are_no_trace() -> None:
    assert decode_trace("a" * 32, b"") is None
    with pytest.raises(MalformedError):
        decode_trace("a" * 32, b"\xff\xff")
