from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from picking import (
    PREFIX_AWARE,
    Picker,
    PromptExchange,
    chat,
    endpoint,
    headers_set,
    request_body,
    request_headers,
    response_body,
    response_headers,
)

from llmtrace.picker.exchange import CHUNK_BYTES, MAX_BODY_BYTES, Services
from llmtrace.picker.ext_proc import ProcessingRequest
from llmtrace.picker.scheduler import Scheduler
from llmtrace.semconv import attributes as a
from llmtrace.spans import Tracer

CLIENT = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
ENVOY = "00-" + "1" * 32 + "-" + "3" * 16 + "-01"
MODEL = {"model_name": "smol", "target_model_name": "smol", "fairness_id": "default-flow", "priority": "0"}
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


@pytest.fixture
def picker(tmp_path: Path) -> Picker:
    return Picker(tmp_path)


def route(exchange: PromptExchange, body: bytes | None = None, **headers: str) -> list[Any]:
    assert exchange.handle(request_headers(**headers)) == []
    return exchange.handle(request_body(chat() if body is None else body))


def complete(picker: Picker, content: str = "Hello") -> str:
    """Route a request and answer it; returns the endpoint."""
    exchange = picker.exchange()
    routed = route(exchange, chat(content))
    exchange.handle(response_headers())
    exchange.handle(response_body(json.dumps({"usage": USAGE}).encode()))
    exchange.close()
    return headers_set(routed[0])[a.DESTINATION_HEADER]


def test_a_request_is_routed_when_its_body_is_complete(picker: Picker) -> None:
    exchange, body = picker.exchange(), chat("x" * 100)
    assert exchange.handle(request_headers()) == []
    assert exchange.handle(request_body(body[:50], end_of_stream=False)) == []
    assert exchange.handle(request_body(body[50:], end_of_stream=False)) == []
    headers, sent = exchange.handle(request_body(b"", end_of_stream=True))
    destination = headers_set(headers)[a.DESTINATION_HEADER]
    assert destination in ("10.0.0.1:8000", "10.0.0.2:8000")
    assert headers.request_headers.response.clear_route_cache
    metadata = headers.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert metadata[a.DESTINATION_HEADER].string_value == destination
    streamed = sent.request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (body, True)


def test_a_large_body_goes_on_in_pieces(picker: Picker) -> None:
    body = chat("x" * (2 * CHUNK_BYTES))
    _, *pieces = route(picker.exchange(), body)
    streamed = [piece.request_body.response.body_mutation.streamed_response for piece in pieces]
    assert b"".join(piece.body for piece in streamed) == body
    assert [piece.end_of_stream for piece in streamed] == [False, False, True]
    assert all(len(piece.body) <= CHUNK_BYTES for piece in streamed)


def test_trailers_end_a_body_too(picker: Picker) -> None:
    exchange = picker.exchange()
    exchange.handle(request_headers())
    assert exchange.handle(request_body(chat(), end_of_stream=False)) == []
    trailers = ProcessingRequest()
    trailers.request_trailers.SetInParent()
    kinds = [response.WhichOneof("response") for response in exchange.handle(trailers)]
    assert kinds == ["request_headers", "request_body", "request_trailers"]


def test_the_second_request_goes_where_its_prefix_is(picker: Picker) -> None:
    prompt = "word " * 500
    first = complete(picker, prompt)
    assert [complete(picker, prompt + str(number)) for number in range(5)] == [first] * 5


def test_fallbacks_stand_in_the_destination_header(tmp_path: Path) -> None:
    content = json.loads(json.dumps(PREFIX_AWARE))
    content["plugins"][-1]["parameters"] = {"maxNumOfEndpoints": 2}
    destination = headers_set(route(Picker(tmp_path, content, endpoints=3).exchange())[0])[a.DESTINATION_HEADER]
    assert re.fullmatch(r"10\.0\.0\.\d:8000,10\.0\.0\.\d:8000", destination)


def test_the_proxy_may_limit_the_candidates(picker: Picker) -> None:
    exchange, message = picker.exchange(), request_headers()
    entry = message.metadata_context.filter_metadata.add(key=a.SUBSET_NAMESPACE)
    entry.value.fields[a.SUBSET_KEY].list_value.values.add(string_value="10.0.0.2:8000")
    exchange.handle(message)
    routed = exchange.handle(request_body(chat()))
    assert headers_set(routed[0])[a.DESTINATION_HEADER] == "10.0.0.2:8000"


def test_a_request_without_body_goes_anywhere(picker: Picker) -> None:
    (routed,) = picker.exchange().handle(request_headers(end_of_stream=True))
    assert headers_set(routed)[a.DESTINATION_HEADER].startswith("10.0.0.")


# Errors


def immediate(exchange: PromptExchange, body: bytes) -> Any:
    (response,) = route(exchange, body)
    exchange.close()
    assert exchange.answered
    return response.immediate_response


def test_a_body_that_is_no_json_is_answered_400(picker: Picker) -> None:
    response = immediate(picker.exchange(), b"{")
    assert response.status.code == 400
    assert response.body.startswith(b"inference error: BadRequest - error unmarshaling request bodyMap")
    span = picker.span(a.GATEWAY_SPAN)
    assert span.status == "ERROR"
    assert [event.name for event in span.events] == ["exception"]
    assert (
        picker.value(
            "llm_d_epp_request_error_total",
            **{**dict.fromkeys(MODEL, ""), "fairness_id": "default-flow", "priority": "0", "error_code": "BadRequest"},
        )
        == 1
    )


def test_a_missing_model_is_answered_400(picker: Picker) -> None:
    response = immediate(picker.exchange(), b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (response.status.code, b"model not found in request body" in response.body) == (400, True)


@pytest.mark.parametrize("pool", [[], [endpoint(7, ready=False)]])
def test_without_a_ready_endpoint_503_and_the_reason(picker: Picker, pool: list[Any]) -> None:
    picker.handle.pool.replace(pool)
    response = immediate(picker.exchange(), chat())
    assert response.status.code == 503
    (option,) = response.headers.set_headers
    assert (option.header.key, option.header.raw_value) == (a.DROPPED_REASON_HEADER, b"rejected-no-endpoints")
    assert picker.span(a.ORCHESTRATION_SPAN).status == "ERROR"
    (answer,) = picker.exchange().handle(request_headers(end_of_stream=True))
    assert answer.immediate_response.status.code == 503


def test_a_huge_body_is_answered_413(picker: Picker) -> None:
    exchange = picker.exchange()
    exchange.handle(request_headers())
    piece = request_body(b"x" * (MAX_BODY_BYTES // 2 + 1), end_of_stream=False)
    assert exchange.handle(piece) == []
    (response,) = exchange.handle(piece)
    assert response.immediate_response.status.code == 413


def test_a_fault_in_scheduling_does_not_fail_the_request(picker: Picker, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = picker.configuration.profiles["default"].scorers[0].scorer
    monkeypatch.setattr(scorer, "score", lambda *_: 1 / 0)
    exchange = picker.exchange()
    routed = route(exchange)
    assert headers_set(routed[0])[a.DESTINATION_HEADER].startswith("10.0.0.")
    exchange.close()
    assert picker.span(a.ORCHESTRATION_SPAN).status == "ERROR"


# Spans


def test_the_span_hangs_under_envoys_own_span_of_the_stream(picker: Picker) -> None:
    exchange = picker.exchange({"traceparent": ENVOY})
    routed = route(exchange, traceparent=CLIENT)
    exchange.close()
    span = picker.span(a.GATEWAY_SPAN)
    assert span.parent_id == "3" * 16
    passed_on = headers_set(routed[0])["traceparent"]
    assert passed_on == f"00-{'1' * 32}-{span.span_id}-01", "the model server hangs under it"


def test_without_it_under_the_callers(picker: Picker) -> None:
    for metadata in ({}, {"traceparent": "garbage"}):
        exchange = picker.exchange(metadata)
        route(exchange, traceparent=CLIENT)
        exchange.close()
    assert {s.parent_id for s in picker.spans if s.name == a.GATEWAY_SPAN} == {"2" * 16}


def test_a_caller_whose_trace_is_not_continued_is_linked(picker: Picker) -> None:
    stranger = ("4" * 32, "5" * 16)
    for told in ("00-{}-{}-01".format(*stranger), "garbage", CLIENT):
        exchange = picker.exchange({"traceparent": ENVOY})
        route(exchange, **{a.CALLER_HEADER: told})
        exchange.close()
    linked = [span.links for span in picker.spans if span.name == a.GATEWAY_SPAN]
    assert [[(link.trace_id, link.span_id) for link in links] for links in linked] == [[stranger], [], []]


def test_without_tracing_the_callers_context_goes_on_untouched(tmp_path: Path) -> None:
    picker = Picker(tmp_path)
    off = Tracer(TracerProvider(), None, "off")
    scheduler = Scheduler(picker.configuration, picker.handle.metrics, off)
    exchange = PromptExchange(Services.make(picker.handle.pool, scheduler, picker.handle.metrics, off), {})
    assert "traceparent" not in headers_set(route(exchange, traceparent=CLIENT)[0])


def test_an_unsampled_request_stays_so(picker: Picker) -> None:
    exchange = picker.exchange()
    routed = route(exchange, traceparent=CLIENT[:-1] + "0")
    exchange.close()
    assert picker.spans == []
    assert headers_set(routed[0])["traceparent"].endswith("-00")


def test_every_endpoints_scores_are_in_the_trace(picker: Picker) -> None:
    complete(picker, "word " * 500)
    picker.memory.ended.clear()
    complete(picker, "word " * 500)
    prefix = picker.span("llm_d.epp.scorer.prefix-cache-scorer").attributes
    assert prefix[a.SCORER_ENDPOINTS] == ["default/vllm-0", "default/vllm-1"]
    assert sorted(prefix[a.SCORER_SCORES]) == [0.0, 1.0]  # type: ignore[type-var, arg-type]
    assert sorted(prefix[a.MATCH_TOKENS]) == [0, prefix[a.ESTIMATED_PROMPT_TOKENS]]  # type: ignore[type-var, arg-type]
    gateway = picker.span(a.GATEWAY_SPAN).attributes
    chosen = prefix[a.SCORER_ENDPOINTS][prefix[a.SCORER_SCORES].index(1.0)]  # type: ignore[index, union-attr]
    assert gateway[a.ENDPOINT_NAME] == chosen
    assert (gateway[a.INPUT_TOKENS], gateway[a.OUTPUT_TOKENS], gateway[a.CACHED_TOKENS]) == (9, 3, 4)


def test_a_stream_is_passed_on_piece_by_piece_and_measured(picker: Picker) -> None:
    exchange = picker.exchange()
    route(exchange, chat(stream=True))
    assert picker.value("llm_d_epp_request_running", **MODEL) == 1
    (headers,) = exchange.handle(response_headers(content_type="text/event-stream; charset=utf-8"))
    assert headers_set(headers, "response_headers") == {"x-went-into-resp-headers": "true"}
    chunks = [
        b'data: {"choices":[{"finish_reason":"stop"}]}\n\n',
        b"data: " + json.dumps({"usage": USAGE}).encode(),
        b"",
    ]
    for index, chunk in enumerate(chunks):
        (sent,) = exchange.handle(response_body(chunk, end_of_stream=index == 2))
        streamed = sent.response_body.response.body_mutation.streamed_response
        assert (streamed.body, streamed.end_of_stream) == (chunk, index == 2)
    exchange.close()
    attributes = picker.span(a.GATEWAY_SPAN).attributes
    assert attributes[a.FINISH_REASONS] == ["stop"]
    assert attributes[a.GATEWAY_TTFT] >= 0  # type: ignore[operator]
    assert picker.value("llm_d_epp_request_running", **MODEL) == 0
    assert picker.value("llm_d_epp_request_total", **MODEL) == 1
    assert picker.value("llm_d_epp_request_cached_tokens_sum", **MODEL) == 4
    assert picker.value("llm_d_epp_request_ttft_seconds_count", **MODEL, streaming="true") == 1
    assert picker.value("llm_d_epp_request_streaming_tpot_seconds_count", **MODEL) == 1
    assert picker.value("llm_d_epp_ready_endpoints", name="pool") == 2


def test_a_failing_model_server_shows(picker: Picker) -> None:
    exchange = picker.exchange()
    route(exchange)
    exchange.handle(response_headers(500))
    exchange.handle(response_body(b"oops"))
    exchange.close()
    assert picker.span(a.GATEWAY_SPAN).status == "ERROR"
    assert picker.value("llm_d_epp_request_error_total", **MODEL, error_code="ModelServerError") == 1


def test_an_unknown_model_is_the_model_servers_answer(picker: Picker) -> None:
    exchange = picker.exchange()
    assert headers_set(route(exchange, chat(model="unknown"))[0])[a.DESTINATION_HEADER]
    exchange.handle(response_headers(404))
    exchange.handle(response_body(b'{"error": {}}'))
    exchange.close()
    span = picker.span(a.GATEWAY_SPAN)
    assert span.status == "UNSET"
    assert span.attributes["http.response.status_code"] == 404


def test_a_client_that_leaves_shows(picker: Picker) -> None:
    exchange = picker.exchange()
    route(exchange)
    exchange.close(cancelled=True)
    assert picker.span(a.GATEWAY_SPAN).status == "ERROR"
    assert picker.value("llm_d_epp_request_running", **MODEL) == 0
    assert picker.value("llm_d_epp_request_error_total", **MODEL, error_code="ClientDisconnect") == 1


def test_no_prompt_text_is_in_the_spans(picker: Picker) -> None:
    complete(picker, "CANARY-7f3a")
    assert "CANARY" not in str(picker.spans)


def test_clients_cannot_make_metrics_grow_without_limit(picker: Picker) -> None:
    picker.handle.metrics._pairs._limit = 3
    for number in range(6):
        exchange = picker.exchange()
        route(exchange, chat(model=f"m{number}"))
        exchange.close()
    names = {
        s.labels["model_name"]
        for f in picker.handle.metrics.registry.collect()
        for s in f.samples
        if s.name == "llm_d_epp_request_total"
    }
    assert names == {"m0", "m1", "m2", "other"}
