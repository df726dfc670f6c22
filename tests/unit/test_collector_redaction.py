"""No text of a user, a model, an error or a header leaves the real Collector, in any rendering, by any way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from collecting import Backend, Collector, backend, collecting, spans_of
from loopback import until
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from llmtrace.semconv import attributes as names
from llmtrace.traces.otlp import key_values

CONTENT = (
    # OpenTelemetry's conventions, now and before.
    *("gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.tool.definitions"),
    *(
        "gen_ai.tool.call.arguments",
        "gen_ai.tool.call.result",
        "gen_ai.retrieval.query.text",
        "gen_ai.retrieval.documents",
    ),
    *("gen_ai.prompt", "gen_ai.prompt.0.content", "gen_ai.completion", "gen_ai.completion.0.content"),
    *("gen_ai.user.message", "gen_ai.choice", "gen_ai.event.content", "gen_ai.request.stop_sequences"),
    *("gen_ai.evaluation.explanation", "db.query.text", "db.statement", "db.query.parameter.0"),
    # OpenLLMetry, OpenInference, Langfuse, MLflow, Pydantic AI.
    *("llm.prompts", "llm.prompts.0.content", "llm.completions", "traceloop.entity.input", "traceloop.entity.output"),
    *("llm.input_messages.0.message.content", "llm.output_messages.0.message.content", "llm.prompt_template.template"),
    *("llm.invocation_parameters", "input.value", "output.value", "retrieval.documents.0.document.content"),
    *("embedding.embeddings.0.embedding.text", "reranker.query", "tool.parameters", "message.content"),
    *("langfuse.observation.input", "langfuse.trace.output", "mlflow.spanInputs", "mlflow.spanOutputs"),
    *("pydantic_ai.all_messages", "all_messages_events", "final_result", "tool_arguments", "tool_response"),
    # Bodies and plain words.
    *("http.request.body", "http.response.body.content", "request.body", "response_body", "body", "content", "message"),
    *("prompt", "completion", "messages", "input", "output", "text"),
)
ERRORS = (
    "exception.message",
    "exception.stacktrace",
    "error.message",
    "error_message",
    "grpc.message",
    "otel.status_description",
)
HEADERS = (
    *("http.request.header.authorization", "http.request.header.x-user", "http.response.header.set-cookie"),
    *("rpc.grpc.request.metadata.token", "Authorization", "cookie", "x-api-key", "user_agent", "user_agent.original"),
    *("url.query", "http.request.query", "baggage.user", "process.command_line", "process.command_args", "headers"),
)
KEPT = {
    "gen_ai.request.model": "m",
    "gen_ai.usage.input_tokens": 7,
    "gen_ai.tool.call.id": "t1",
    "gen_ai.output.type": "text",
    "http.request.body.size": 3074,
    "error.type": "TimeoutError",
    "llmtrace.scorer.scores": [0.4123456789012345, 0.5],
    "gen_ai.request.id": "41234567-1234-4123-8123-412345678901",
}
DEBUG = """
exporters:
  debug: {verbosity: detailed}
service:
  pipelines:
    traces:
      exporters: [%s, debug]
    metrics:
      exporters: [otlp_http/prometheus, debug]
"""
EXPORTER = {"local": "otlp_http/store", "agent": "otlp_grpc/gateway", "gateway": "otlp_http/store"}
PERCENT = {"SAMPLED_PERCENT": "100"}


class Canaries:
    """Makes texts that are unique and found again."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> str:
        self.made += 1
        return f"CANARY{self.made}: what is the capital of France?"

    def attributes(self, *names: str) -> list[KeyValue]:
        return key_values({name: self() for name in names})

    def nested(self, key: str, inner: str) -> KeyValue:
        """A structured value with a text some levels down."""
        text = KeyValue(key=inner, value=AnyValue(string_value=self()))
        value = AnyValue(kvlist_value=KeyValueList(values=[*key_values({"a": "1"}), text]))
        wrapped = AnyValue()
        wrapped.array_value.values.append(value)
        return KeyValue(key=key, value=wrapped)


def poisoned(canary: Canaries) -> ExportTraceServiceRequest:
    """A span with a text wherever OTLP has a place for one."""
    all_names = (*CONTENT, *ERRORS, *HEADERS)
    request = spans_of({"name": f"GET /v1/models?q={canary()}", "kind": Span.SPAN_KIND_SERVER, "attributes": KEPT})
    (group,) = request.resource_spans
    (scope,) = group.scope_spans
    (span,) = scope.spans
    group.resource.attributes.extend(canary.attributes(*all_names))
    scope.scope.attributes.extend(canary.attributes(*all_names))
    span.attributes.extend(canary.attributes(*all_names))
    span.attributes.extend(
        [
            canary.nested("structured", "gen_ai.prompt"),
            canary.nested("request", "content"),
            canary.nested("gen_ai.input.messages.structured", "parts"),
            *key_values({"as_json": f'{{"n": 1, "messages": [{{"role": "user", "content": "{canary()}"}}]}}'}),
            *key_values(
                {
                    "url.full": f"http://u:{canary().removesuffix('?')}@h:1/p?q={canary()}",
                    "http.url": f"http://u:{canary()}@h/p?q={canary()}#{canary()}",
                }
            ),
            *key_values({"http.target": f"/p?{canary()}", "client.address": canary()}),
            *key_values({"llmtrace.caller.traceparent": canary(), "downstream_cluster": canary()}),
        ]
    )
    event = span.events.add(name="exception")
    event.attributes.extend(
        [*canary.attributes(*all_names), *key_values({"exception.type": f"ValueError({canary()!r})"})]
    )
    span.events.add(name="gen_ai.content.prompt").attributes.extend(canary.attributes(*CONTENT))
    link = span.links.add(trace_id=b"\x05" * 16, span_id=b"\x06" * 8, trace_state=f"x={canary()}")
    link.attributes.extend(canary.attributes("note", *all_names))
    span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=canary()))
    span.trace_state = f"vendor={canary()}"
    failed = scope.spans.add()
    failed.CopyFrom(span)
    failed.span_id = b"\x07" * 8
    del failed.attributes[:]
    failed.attributes.extend(key_values({"error.type": f"ValueError: {canary()}"}))
    return request


def poisoned_metrics(canary: Canaries) -> ExportMetricsServiceRequest:
    request = ExportMetricsServiceRequest()
    group = request.resource_metrics.add()
    group.resource.attributes.extend([*key_values({"service.name": "test"}), *canary.attributes(*CONTENT, *HEADERS)])
    scope = group.scope_metrics.add()
    scope.scope.attributes.extend(canary.attributes(*CONTENT))
    metric = scope.metrics.add(name="requests")
    metric.sum.aggregation_temporality = 2
    metric.sum.is_monotonic = True
    point = metric.sum.data_points.add(as_int=1, time_unix_nano=2, start_time_unix_nano=1)
    point.attributes.extend([*canary.attributes(*CONTENT, *ERRORS, *HEADERS), *key_values({"model": "m"})])
    point.exemplars.add(as_int=1, time_unix_nano=2).filtered_attributes.extend(canary.attributes("note", *CONTENT))
    return request


def everything(collector: Collector, store: Backend) -> dict[str, str]:
    """All that came out of the Collector, as text."""
    return {
        "traces": b"".join(store.traces).decode(errors="replace"),
        "metrics": b"".join(store.metrics).decode(errors="replace"),
        "own metrics": collector.page(),
        "log and debug": collector.log(),
    }


@pytest.mark.parametrize("name", EXPORTER)
def test_no_canary_leaves(name: str, tmp_path: Path) -> None:
    canary = Canaries()
    with backend() as store, collecting(name, tmp_path, store, PERCENT, DEBUG % EXPORTER[name]) as collector:
        assert collector.send(poisoned(canary))
        post_metrics(collector, poisoned_metrics(canary))
        until(lambda: len(store.spans()) >= 2, "both spans", 20)
        until(lambda: metric_named(store, "requests"), "the metric", 20)
        if name != "agent":
            until(lambda: metric_named(store, "llmtrace.span.duration"), "metrics of spans", 20)
        until(lambda: "requests" in collector.log(), "the debug exporter", 20)
        found = everything(collector, store)
    found["log and debug"] = collector.log()
    assert canary.made > 300
    assert {place: text.count("CANARY") for place, text in found.items() if "CANARY" in text} == {}
    received = store.spans()[0]
    plain = {attribute.key: attribute.value for attribute in received.attributes}
    for attribute in key_values(KEPT):
        assert plain[attribute.key] == attribute.value, attribute.key
    assert not {*CONTENT, *ERRORS} & plain.keys()
    assert plain["url.full"].string_value == "http://h:1/p"
    assert "http.url" not in plain
    assert received.name == "GET /v1/models"
    assert [event.name for event in received.events] == ["exception", "gen_ai.content.prompt"]
    assert not {*CONTENT, *ERRORS} & {attribute.key for event in received.events for attribute in event.attributes}


def post_metrics(collector: Collector, request: ExportMetricsServiceRequest) -> None:
    import httpx

    headers = {"content-type": "application/x-protobuf"}
    httpx.post(f"{collector.url}/v1/metrics", content=request.SerializeToString(), headers=headers).raise_for_status()


def metric_named(store: Backend, name: str) -> bool:
    return any(
        metric.name == name
        for request in store.metric_requests()
        for group in request.resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
    )


SECRETS = {
    "an e-mail address": "jane.doe+x@mail.example.com",
    "a bearer token": "Bearer abcDEF0123456789.xyz",
    "an OpenAI key": "sk-proj-abcdefghijklmnop0123",
    "a Hugging Face token": "hf_abcdefghijklmnopqrstuvwx",
    "a GitHub token": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "an AWS key": "AKIAIOSFODNN7EXAMPLE",
    "a JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "a password": "password=hunter2hunter2",
    "a card": "4111 1111 1111 1111",
    "another card": "378282246310005",
    "a social security number": "078-05-1120",
    "a private key": "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----",
}


@pytest.mark.parametrize("name", EXPORTER)
def test_texts_that_are_allowed_pass_without_their_secrets(name: str, tmp_path: Path) -> None:
    text = "France " + " and ".join(SECRETS.values()) + " Paris"
    attributes: dict[str, Any] = {"gen_ai.prompt": text, "http.request.header.x-user": "CANARY header"}
    request = spans_of({"attributes": attributes})
    span = request.resource_spans[0].scope_spans[0].spans[0]
    part = KeyValue(key="content", value=AnyValue(string_value=text))
    messages = AnyValue()
    messages.array_value.values.append(AnyValue(kvlist_value=KeyValueList(values=[part])))
    span.attributes.append(KeyValue(key="gen_ai.input.messages", value=messages))
    span.events.add(name="exception").attributes.extend(
        key_values({"exception.type": "ValueError", "exception.message": text})
    )
    span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message="CANARY status"))
    with backend() as store, collecting(name, tmp_path, store, PERCENT, capture=True) as collector:
        assert collector.send(request)
        until(lambda: store.spans(), "the span", 20)
        received = store.spans()[0]
    sent = received.SerializeToString().decode(errors="replace")
    assert "CANARY" not in sent
    assert [what for what, secret in SECRETS.items() if secret in sent or secret.split("\n")[-2:][0] in sent] == []
    plain = {attribute.key: attribute.value for attribute in received.attributes}
    message = received.events[0].attributes[1].value.string_value
    for passed in (plain["gen_ai.prompt"].string_value, str(plain["gen_ai.input.messages"]), message):
        assert "France" in passed
        assert "Paris" in passed


CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_links_and_messages_of_the_kits_own_components_are_kept(tmp_path: Path) -> None:
    message = "the model server answered 503"
    kits = (
        names.CLIENT_SERVICE,
        names.ENVOY_SERVICE,
        names.PICKER_SERVICE,
        names.SIDECAR_SERVICE,
        names.SERVER_SERVICE,
    )
    others = ("somebody", "vllm-proxy", "my-envoy")
    made = ExportTraceServiceRequest()
    for service in (*kits, *others):
        one = spans_of(
            {"name": service, "attributes": {"error.type": "403", "llmtrace.caller.traceparent": CALLER}},
            {"name": f"{service} with the class", "attributes": {"error.type": "403"}},
            resource={"service.name": service},
        )
        for span, text in zip(one.resource_spans[0].scope_spans[0].spans, (message, "403"), strict=True):
            span.links.add(trace_id=b"\x05" * 16, span_id=b"\x06" * 8)
            span.status.CopyFrom(Status(code=Status.STATUS_CODE_ERROR, message=text))
            span.trace_state = "ot=th:c;rv:9b8233f7e3a151"
        made.MergeFrom(one)
    with backend() as store, collecting("local", tmp_path, store) as collector:
        assert collector.send(made)
        until(lambda: len(store.spans()) == 2 * len(kits + others), "the spans", 20)
        spans = {span.name: span for span in store.spans()}
    assert {name for name in (*kits, *others) if spans[name].links} == {*kits}
    assert {spans[name].status.message for name in (*kits, *others)} == {message}
    assert {spans[f"{name} with the class"].status.message for name in (*kits, *others)} == {"403"}
    assert {span.trace_state for span in spans.values()} == {"ot=th:c;rv:9b8233f7e3a151"}
    assert key_values({"llmtrace.caller.traceparent": CALLER})[0] in spans[names.ENVOY_SERVICE].attributes
