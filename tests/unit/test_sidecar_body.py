from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.sidecar.body import APIS, Api, UsageRewriter, cached_tokens, decode_leg, dump, parse, prefill_leg

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    *("stream", "stream_options", "max_tokens", "max_completion_tokens", "min_tokens", "max_output_tokens"),
    *("sampling_params", "kv_transfer_params", "model", "messages", "prompt"),
)
bodies = st.dictionaries(st.sampled_from(FIELDS) | st.text(), values, max_size=8)
apis = st.sampled_from(list(APIS.values()))


@given(bodies, st.dictionaries(st.text(), values))
def test_the_decode_leg_is_the_clients_request_with_the_params(body: dict[str, Any], params: dict[str, Any]) -> None:
    leg = json.loads(decode_leg(body, {"kv_transfer_params": params, "usage": {}}))
    assert leg == {**body, "kv_transfer_params": params}


@given(bodies, apis)
def test_the_prefill_leg_changes_nothing_but_limits_stream_and_params(body: dict[str, Any], api: Api) -> None:
    before = json.dumps(body)
    leg = json.loads(prefill_leg(body, api))
    assert json.dumps(body) == before, "the decode leg needs it as it was"
    limits = leg[api.inside] if api.inside else leg
    assert [limits[field] for field in api.limits] == [1] * len(api.limits)
    assert leg["stream"] is False
    assert "stream_options" not in leg
    assert leg["kv_transfer_params"]["do_remote_decode"] is True
    touched = {"stream", "stream_options", "kv_transfer_params", *([api.inside] if api.inside else api.limits)}
    assert {k: v for k, v in leg.items() if k not in touched} == {k: v for k, v in body.items() if k not in touched}
    if api.inside and isinstance(body.get(api.inside), dict):
        assert limits == {**body[api.inside], **dict.fromkeys(api.limits, 1)}


@given(bodies)
def test_what_is_written_is_read_again(body: dict[str, Any]) -> None:
    assert parse(dump(body)) == body
    assert parse(json.dumps(body).encode()) == body


def test_numbers_and_text_beyond_gos_reach_survive() -> None:
    raw = b'{"seed": 9223372036854775807, "half": "\\ud800", "text": "\xc3\xa4 \xf0\x9f\x90\x98", "top_p": 0.1}'
    assert json.loads(decode_leg(parse(raw), {})) == {**json.loads(raw), "kv_transfer_params": None}


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"1", b'"x"', b'{"x": NaN}', b'{"x": -Infinity}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(raw)


def test_a_number_beyond_a_double_cannot_be_sent_on() -> None:
    with pytest.raises(ValueError, match="JSON"):
        prefill_leg(parse(b'{"x": 1e999}'), APIS["/v1/completions"])


@pytest.mark.parametrize("depth", [*range(900, 1000, 7), 5000])
def test_any_depth_is_sent_on_or_refused(depth: int) -> None:
    raw = b'{"x":' * depth + b"1" + b"}" * depth
    with contextlib.suppress(ValueError):
        assert parse(prefill_leg(parse(raw), APIS["/v1/completions"]))["x"] == parse(raw)["x"]


@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse(raw), dict)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 7}}}, 7),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 7.0}}}, 7),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": True}}}, 0),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": None}}}, 0),
        ({"usage": {"prompt_tokens_details": None}}, 0),
        ({"usage": {"cached_tokens": 9}}, 0),
        ({"usage": []}, 0),
        ({}, 0),
    ],
)
def test_cached_tokens_of_the_prefill_server(answer: dict[str, Any], tokens: int) -> None:
    assert cached_tokens(answer) == tokens


def test_usage_is_rewritten_and_nothing_else() -> None:
    content = {
        "id": "x",
        "text": "ä",
        "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8, "y": 1}},
    }
    changed = UsageRewriter(3).whole(json.dumps(content).encode())
    content["usage"]["prompt_tokens_details"]["cached_tokens"] = 3  # type: ignore[index]
    assert json.loads(changed) == content


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no json",
        b'{"choices": []}',
        b'{"usage": null}',
        b'["usage"]',
        b'{"usage": {"prompt_tokens_details": {"cached_tokens": 3}}, "x":  1}',
        b'{"usage": {}, "x": NaN}',
        b'{"usage": {}, "x": 1e999}',
    ],
)
def test_what_needs_or_bears_no_rewriting_stays_as_it_is(raw: bytes) -> None:
    assert UsageRewriter(3).whole(raw) == raw


EVENTS = (
    b'data: {"choices": [{"delta": {"content": "the \\"usage\\" of it"}}]}\n\n'
    b": a comment\r\n"
    b'data: {"choices": [], "usage": {"prompt_tokens": 64}}\r\n\r\n'
    b'data:{"usage": {"x": 1}}\n\n'
    b"data: [DONE]\n\n"
    b'data: {"usage": {"prompt_tokens_details": {"cached_tokens": 49}}}'
)
REWRITTEN = EVENTS.replace(
    b'{"choices": [], "usage": {"prompt_tokens": 64}}',
    b'{"choices":[],"usage":{"prompt_tokens":64,"prompt_tokens_details":{"cached_tokens":7}}}',
).replace(
    b'{"usage": {"prompt_tokens_details": {"cached_tokens": 49}}}',
    b'{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}',
)


@given(st.lists(st.integers(0, len(EVENTS)), max_size=8))
def test_events_are_rewritten_however_they_are_cut(cuts: list[int]) -> None:
    rewriter = UsageRewriter(7)
    places = [0, *sorted(cuts), len(EVENTS)]
    parts = [rewriter.stream(EVENTS[start:end]) for start, end in itertools.pairwise(places)]
    assert b"".join([*parts, rewriter.end()]) == REWRITTEN


@given(st.binary(max_size=60).filter(lambda raw: b'"usage"' not in raw), st.integers(0, 60))
def test_a_stream_without_usage_passes_through(raw: bytes, cut: int) -> None:
    rewriter = UsageRewriter(7)
    assert rewriter.stream(raw[:cut]) + rewriter.stream(raw[cut:]) + rewriter.end() == raw


def test_complete_lines_do_not_wait() -> None:
    rewriter = UsageRewriter(7)
    assert rewriter.stream(b'data: {"a": 1}\n\ndata: {') == b'data: {"a": 1}\n\n'
