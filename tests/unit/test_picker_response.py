from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.picker.response import MAX_EVENT_BYTES, ResponseReader, Usage

USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
EVENTS = [
    {"choices": [{"delta": {"content": 'he said "usage":{'}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "\u2028"}, "finish_reason": "length"}]},
    {"choices": [], "usage": USAGE},
]
STREAM = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"


def read(body: bytes, *, streaming: bool, cuts: list[int] | None = None) -> Usage:
    reader = ResponseReader(streaming=streaming)
    edges = [0, *sorted(cuts or []), len(body)]
    for start, end in pairwise(edges):
        reader.feed(body[start:end])
    return reader.end()


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_a_stream_is_read_however_it_is_cut(cuts: list[int]) -> None:
    assert read(STREAM, streaming=True, cuts=cuts) == Usage(10, 3, 8, ["length"])


def test_windows_line_ends_and_a_missing_last_newline() -> None:
    assert read(STREAM.replace(b"\n", b"\r\n"), streaming=True).cached_tokens == 8
    assert read(STREAM.removesuffix(b"data: [DONE]\n\n").rstrip(), streaming=True).cached_tokens == 8


@given(st.lists(st.integers(0, 90), max_size=4))
def test_a_plain_body_is_read(cuts: list[int]) -> None:
    body = json.dumps({"choices": [{"finish_reason": "stop"}], "usage": USAGE}).encode()
    assert read(body, streaming=False, cuts=cuts) == Usage(10, 3, 8, ["stop"])


@pytest.mark.parametrize(
    "usage", [None, 1, {"prompt_tokens": "x"}, {"prompt_tokens_details": None}, {"prompt_tokens": True}]
)
def test_odd_usage_is_passed_over(usage: object) -> None:
    assert read(json.dumps({"usage": usage}).encode(), streaming=False) == Usage()


@given(st.binary(max_size=300), st.booleans())
def test_no_body_does_harm(body: bytes, streaming: bool) -> None:
    read(body, streaming=streaming)


def test_an_endless_event_is_not_kept() -> None:
    reader = ResponseReader(streaming=True)
    for _ in range(3):
        reader.feed(b"x" * MAX_EVENT_BYTES)
    assert len(reader._pending) == 0
    assert reader.end() == Usage()
