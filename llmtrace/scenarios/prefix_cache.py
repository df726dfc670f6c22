"""The prefix-cache scenario: its name, its two arms, and the trace that each of its requests must produce."""

from __future__ import annotations

from llmtrace.scenarios.expectation import Expectation, ExpectedSpan
from llmtrace.semconv import attributes as a

NAME = "prefix-cache"
CANDIDATE = "prefix-aware"
BASELINE = "random"
ARMS = (CANDIDATE, BASELINE)

_SCORER = "llm_d.epp.scorer."

EXPECTATION = Expectation(
    spans=(
        ExpectedSpan(
            "client",
            "client",
            a.CLIENT_SERVICE,
            "chat *",
            kind="CLIENT",
            attributes=(
                a.OPERATION,
                a.REQUEST_MODEL,
                a.INPUT_TOKENS,
                a.OUTPUT_TOKENS,
                a.CACHED_TOKENS,
                a.CLIENT_TTFT,
                a.CLIENT_E2E,
                a.RUN_ID,
                a.ARM,
            ),
        ),
        ExpectedSpan("envoy", "envoy", a.ENVOY_SERVICE, "*", ("client",), kind="SERVER"),
        ExpectedSpan("gateway", "picker", a.PICKER_SERVICE, "gateway.request", ("envoy", "client"), "SERVER"),
        ExpectedSpan("orchestration", "picker", a.PICKER_SERVICE, "gateway.request_orchestration", ("gateway",)),
        ExpectedSpan(
            "profile",
            "picker",
            a.PICKER_SERVICE,
            "run_scheduler_profile",
            ("orchestration",),
            attributes=("llm_d.epp.scheduling.profile.name",),
        ),
        ExpectedSpan("filter", "picker", a.PICKER_SERVICE, "filter_endpoints", ("profile",)),
        ExpectedSpan(
            "scoring",
            "picker",
            a.PICKER_SERVICE,
            "llm_d.epp.scoring",
            ("profile",),
            attributes=(a.SCORER_COUNT,),
        ),
        ExpectedSpan(
            "scorer",
            "picker",
            a.PICKER_SERVICE,
            f"{_SCORER}*",
            ("scoring",),
            attributes=(a.SCORER_TYPE, a.SCORER_WEIGHT),
            count_from=("scoring", a.SCORER_COUNT),
        ),
        ExpectedSpan(
            "pick",
            "picker",
            a.PICKER_SERVICE,
            "pick_endpoints",
            ("profile",),
            attributes=(a.TOP_ENDPOINTS,),
        ),
        ExpectedSpan(
            "server",
            "vllm",
            a.SERVER_SERVICE,
            "llm_request",
            # The kit's picker passes its own context on; llm-d's passes the caller's on unchanged.
            ("gateway", "envoy", "client"),
            "SERVER",
            attributes=(a.VLLM_PROMPT_TOKENS, a.VLLM_TTFT),
        ),
    ),
    hints={
        "client": "does an OTEL_* variable switch its tracing off or send it elsewhere? is the collector reachable?",
        "collector": "do the collector and the store run and answer? see `llmtrace status`",
        "envoy": "is the OpenTelemetry tracer configured on this listener, and its sampling at 100 %?",
        "picker": "is tracing on (OTEL_TRACES_EXPORTER=otlp) and OTEL_TRACES_SAMPLER_ARG=1.0?",
        "vllm": "is --otlp-traces-endpoint set on every server?",
    },
)
