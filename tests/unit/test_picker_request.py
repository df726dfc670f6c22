from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.picker.request import RequestError, parse

CHAT = {":path": "/v1/chat/completions"}


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def test_a_chat_is_flattened_to_roles_and_texts() -> None:
    raw = body(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ],
        stream=True,
        cache_salt="s",
    )
    request = parse("r", {**CHAT, "x-llm-d-inference-fairness-id": "tenant"}, raw)
    assert request.prompts == (b"systemBe brief.userWhy?" + b"\0",)
    assert (request.model, request.stream, request.cache_salt, request.fairness_id) == ("m", True, "s", "tenant")
    assert request.size_bytes == len(raw)


@pytest.mark.parametrize(
    ("path", "fields", "prompts"),
    [
        ("/v1/completions", {"prompt": "abcd"}, (b"abcd",)),
        ("/v1/completions", {"prompt": ["a", "b"]}, (b"a\0\0\0", b"b\0\0\0")),
        ("/v1/completions", {"prompt": [1, 2]}, (b"\1\0\0\0\2\0\0\0",)),
        ("/v1/completions", {"prompt": [[1], [2]]}, (b"\1\0\0\0", b"\2\0\0\0")),
        ("/v1/embeddings", {"input": "abcd"}, (b"abcd",)),
        ("/v1/completions?x=1", {"prompt": "abcd"}, (b"abcd",)),
        ("/prefix/v1/completions", {"prompt": "abcd"}, (b"abcd",)),
    ],
)
def test_prompts_of_every_form_are_read(path: str, fields: dict[str, object], prompts: tuple[bytes, ...]) -> None:
    assert parse("r", {":path": path}, body(**fields)).prompts == prompts


def test_other_paths_pass_without_interpretation() -> None:
    request = parse("r", {":path": "/tokenize"}, b"\xff not JSON")
    assert (request.model, request.prompts) == ("", ())


@pytest.mark.parametrize(
    ("path", "raw", "message"),
    [
        ("/v1/chat/completions", b"{", "error unmarshaling request bodyMap"),
        ("/v1/chat/completions", b"", "error unmarshaling request bodyMap"),
        ("/v1/chat/completions", b"\xff", "error unmarshaling request bodyMap"),
        ("/v1/chat/completions", b"[1]", "no JSON object"),
        ("/v1/chat/completions", b"[" * 100_000, "error unmarshaling request bodyMap"),
        ("/v1/chat/completions", body(), "must have valid messages field"),
        ("/v1/chat/completions", body(messages=[]), "must have valid messages field"),
        ("/v1/chat/completions", body(messages=["x"]), "must have valid messages field"),
        ("/v1/completions", body(), "must have prompt field"),
        ("/v1/completions", body(prompt=[1.5]), "must have prompt field"),
        ("/v1/completions", body(prompt=[True]), "must have prompt field"),
        ("/v1/embeddings", body(input=[]), "must have input field"),
        ("/v1/responses", body(), "must have input field"),
        ("/v1/completions", b'{"prompt": "x"}', "model not found in request body"),
        ("/v1/completions", rb'{"prompt": "x", "model": "\ud800"}', "model is no valid Unicode"),
        (
            "/v1/completions",
            rb'{"prompt": "x", "model": "m", "cache_salt": "\ud800"}',
            "cache_salt is no valid",
        ),
        ("/v1/completions", b'{"prompt": "x", "model": 1}', "model not found in request body"),
    ],
)
def test_a_malformed_request_is_a_bad_request(path: str, raw: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse("r", {":path": path}, raw)
    assert (caught.value.status, caught.value.code) == (400, "BadRequest")
    assert str(caught.value).startswith("inference error: BadRequest - ")


@given(st.binary(max_size=200), st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/x"]))
def test_no_body_does_harm(raw: bytes, path: str) -> None:
    with suppress(RequestError):
        parse("r", {":path": path}, raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.sampled_from([("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")]))
def test_no_json_does_harm(value: object, target: tuple[str, str]) -> None:
    path, field = target
    with suppress(RequestError):
        request = parse("r", {":path": path}, body(**{field: value}))
        assert all(len(prompt) % 4 == 0 for prompt in request.prompts)
