"""Prefill/decode disaggregation: deciders, the profile handler, and what a request's header and span then say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from picking import (
    DISAGGREGATED,
    Handle,
    Memory,
    Picker,
    chat,
    endpoint,
    headers_removed,
    headers_set,
    request_body,
    request_headers,
    server,
)
from pydantic import ValidationError

from llmtrace.picker.disaggregation import Reason, Verdict
from llmtrace.picker.plugin import REGISTRY, ProfileResult
from llmtrace.picker.plugins.disagg_profile_handler import DisaggProfileHandlerParameters
from llmtrace.picker.prefix_match import DEFAULT_PRODUCER, PrefixMatch
from llmtrace.picker.request import InferenceRequest, RequestError
from llmtrace.semconv import attributes as a
from llmtrace.spans import Span, Tracer

WORD = "word "
LONG, SHORT = WORD * 600, WORD * 20
"""750 and 26 tokens by the picker's estimate: above and below the threshold of 512."""
DECODE = server("decode")


def make(kind: str, **parameters: Any) -> Any:
    plugin = REGISTRY.types[kind]
    return plugin("d", plugin.parameters_type.model_validate(parameters), Handle())


def asked(prompt_tokens: int, cached_blocks: int | None = 0, block_size: int = 1) -> InferenceRequest:
    """A request; without ``cached_blocks`` nothing is known about caches."""
    request = InferenceRequest(id="r", prompts=(b"word" * prompt_tokens,))
    if cached_blocks is not None:
        total = -(-prompt_tokens // block_size)
        match = PrefixMatch({DECODE.id: cached_blocks}, total, block_size, prompt_tokens)
        request.data[DEFAULT_PRODUCER] = match
    return request


def decide(request: InferenceRequest, threshold: int, minimum: int = 0) -> Verdict:
    decider = make("prefix-based-pd-decider", nonCachedTokens=threshold, promptTokens=minimum)
    verdict: Verdict = decider.decide(request, DECODE)
    return verdict


# Deciders


@pytest.mark.parametrize(
    ("threshold", "minimum", "prompt", "cached", "split", "reason"),
    [
        pytest.param(0, 0, 10, 5, False, Reason.SPLITTING_DISABLED, id="threshold zero disables"),
        pytest.param(5, 20, 10, 0, False, Reason.PROMPT_BELOW_MINIMUM, id="input shorter than promptTokens"),
        pytest.param(20, 0, 10, 0, False, Reason.UNCACHED_BELOW_THRESHOLD, id="input shorter than threshold"),
        pytest.param(5, 10, 10, 5, True, Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, id="input equals promptTokens"),
        pytest.param(5, 0, 10, 8, False, Reason.UNCACHED_BELOW_THRESHOLD, id="non-cached suffix below threshold"),
        pytest.param(5, 0, 10, 5, True, Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, id="non-cached suffix equals it"),
        pytest.param(3, 0, 10, 2, True, Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, id="non-cached suffix above it"),
        pytest.param(1, 0, 10, 10, False, Reason.UNCACHED_BELOW_THRESHOLD, id="fully cached prompt"),
        pytest.param(5, 0, 10, 0, True, Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, id="no cache hit at all"),
        pytest.param(1, 0, 0, 0, False, Reason.UNCACHED_BELOW_THRESHOLD, id="no prompt"),
        pytest.param(5, 0, 100, None, False, Reason.NO_PREFIX_DATA, id="no prefix info"),
        pytest.param(101, 0, 100, None, False, Reason.UNCACHED_BELOW_THRESHOLD, id="too short whatever is cached"),
    ],
)
def test_prefix_based_pd_decider(
    threshold: int, minimum: int, prompt: int, cached: int | None, split: bool, reason: Reason
) -> None:
    """Source: llm-d-router, disagg/prefix_based_pd_decider_test.go, TestDisaggregate, TestDisaggregateNoPrefixInfo."""
    verdict = decide(asked(prompt, cached), threshold, minimum)
    assert (verdict.split, verdict.reason) == (split, reason)


def test_the_decider_counts_cached_tokens_in_whole_blocks() -> None:
    """Source: prefix_based_pd_decider_test.go, TestDisaggregate_UsesUnweightedCachedBlockCount."""
    assert decide(asked(4096, 240, 16), 512) == Verdict(
        False, Reason.UNCACHED_BELOW_THRESHOLD, 4096, cached_tokens=3840, threshold_tokens=512, minimum_prompt_tokens=0
    )
    assert decide(asked(4096, 192, 16), 512).split


def test_the_decider_tells_what_it_looked_at() -> None:
    assert decide(asked(10), 0, 3) == Verdict(False, Reason.SPLITTING_DISABLED, threshold_tokens=0)
    assert decide(asked(2), 5, 3) == Verdict(False, Reason.PROMPT_BELOW_MINIMUM, 2, None, 5, 3)
    assert decide(asked(9, None), 5, 3) == Verdict(False, Reason.NO_PREFIX_DATA, 9, None, 5, 3)
    assert decide(asked(9, 1), 5, 3) == Verdict(True, Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD, 9, 1, 5, 3)


def test_data_of_another_kind_is_no_data() -> None:
    """Source: prefix_based_pd_decider_test.go, TestDisaggregateWrongPrefixInfoType."""
    request = asked(100, None)
    request.data[DEFAULT_PRODUCER] = {DECODE.id: 3}
    assert decide(request, 5).reason is Reason.NO_PREFIX_DATA


def test_the_decider_reads_the_producer_that_it_is_told_of() -> None:
    request = asked(100, None)
    request.data["mine"] = PrefixMatch({DECODE.id: 60}, 100, 1, 100)
    decider = make("prefix-based-pd-decider", nonCachedTokens=50, prefixMatchInfoProducerName="mine")
    assert decider.decide(request, DECODE).reason is Reason.UNCACHED_BELOW_THRESHOLD


def test_an_endpoint_that_the_data_leave_out_has_nothing_cached() -> None:
    decider = make("prefix-based-pd-decider", nonCachedTokens=5)
    assert decider.decide(asked(9, 9), server("decode", 1)).cached_tokens == 0


def test_always_disagg_pd_decider() -> None:
    verdict = make("always-disagg-pd-decider").decide(asked(0, None), DECODE)
    assert verdict == Verdict(True, Reason.ALWAYS)


tokens = st.integers(0, 3000)
cached_blocks = st.one_of(st.none(), st.integers(0, 60))
block_sizes = st.sampled_from([1, 16, 64, 128])


@given(tokens, cached_blocks, block_sizes, tokens, tokens)
def test_the_rule(prompt: int, cached: int | None, block_size: int, threshold: int, minimum: int) -> None:
    """llm-d's rule, in its order, written down a second time."""
    verdict = decide(asked(prompt, cached, block_size), threshold, minimum)
    if threshold == 0 or (minimum > 0 and prompt < minimum) or prompt < threshold or cached is None:
        assert not verdict.split
    else:
        assert verdict.split == (prompt - cached * block_size >= threshold)
    assert (verdict.reason is Reason.UNCACHED_AT_OR_ABOVE_THRESHOLD) == verdict.split
    if verdict.cached_tokens is not None:
        assert verdict.prompt_tokens is not None
        assert 0 <= verdict.cached_tokens <= verdict.prompt_tokens == prompt


@given(tokens, cached_blocks, block_sizes, tokens, tokens, st.integers(0, 500))
def test_the_decision_is_monotone(
    prompt: int, cached: int | None, block_size: int, threshold: int, minimum: int, more: int
) -> None:
    def split(prompt: int, cached: int | None, threshold: int, minimum: int) -> bool:
        return decide(asked(prompt, cached, block_size), threshold, minimum).split

    if split(prompt, cached, threshold, minimum):
        assert split(prompt + more, cached, threshold, minimum), "a longer prompt"
        assert split(prompt, cached, max(threshold - more, 1), minimum), "a lower threshold"
        assert split(prompt, cached, threshold, max(minimum - more, 0)), "a lower minimum"
    elif cached is not None:
        assert not split(prompt, cached + more, threshold, minimum), "more cached"
        if threshold > 0:
            assert not split(prompt, cached, threshold + more, minimum), "a higher threshold"


@given(
    st.lists(st.binary(max_size=200), max_size=3),
    st.one_of(st.none(), st.text(), st.integers(), st.dictionaries(st.text(), st.integers())),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_decider_never_raises(prompts: list[bytes], data: object, threshold: int, minimum: int) -> None:
    request = InferenceRequest(id="r", prompts=tuple(prompts), data={DEFAULT_PRODUCER: data})
    assert not decide(request, threshold, minimum).split


# The profile handler


class Others:
    """The rest of a configuration: every profile, and a decider with one answer."""

    profiles = ()
    type = "decides"

    def __init__(self, split: bool) -> None:
        self.verdict = Verdict(split, Reason.ALWAYS if split else Reason.PROMPT_BELOW_MINIMUM)

    def decide(self, *_: Any) -> Verdict:
        return self.verdict

    def find(self, *_: Any) -> Any:
        return self

    def profile(self, *_: Any) -> None: ...

    def producer(self, *_: Any) -> None: ...


def handler(split: bool | None = None, **parameters: Any) -> Any:
    deciders = {} if split is None else {"deciders": {"prefill": "decides"}}
    made = make("disagg-profile-handler", **deciders, **parameters)
    made.connect(Others(bool(split)))
    return made


def span() -> Span:
    return Tracer(TracerProvider(), Memory(), "test").start("root", None, SpanKind.SERVER)


POD = ProfileResult([DECODE])
FOUND, FAILED = POD, None


@pytest.mark.parametrize(
    ("split", "results", "picked"),
    [
        pytest.param(True, {}, ["decode"], id="decode not run"),
        pytest.param(True, {"decode": FAILED}, [], id="decode failed"),
        pytest.param(True, {"decode": FOUND}, ["prefill"], id="the decider approves"),
        pytest.param(False, {"decode": FOUND}, [], id="the decider rejects"),
        pytest.param(True, {"decode": FOUND, "prefill": FOUND}, [], id="all profiles done"),
        pytest.param(True, {"decode": FOUND, "prefill": FAILED}, [], id="prefill failed"),
        pytest.param(None, {}, ["decode"], id="no decider, decode not run"),
        pytest.param(None, {"decode": FOUND}, [], id="no decider, decode done"),
    ],
)
def test_steps_decode_first(split: bool | None, results: dict[str, ProfileResult | None], picked: list[str]) -> None:
    """Source: llm-d-router, disagg_profile_handler_test.go, TestHandler_Pick_PD and TestHandler_Pick_NilDeciders."""
    assert handler(split).pick(asked(8), ["prefill", "decode"], results, span()) == picked


@pytest.mark.parametrize(
    ("results", "picked"),
    [
        pytest.param({}, ["prefill"], id="prefill not run"),
        pytest.param({"prefill": FOUND}, ["decode"], id="prefill done"),
        pytest.param({"prefill": FAILED}, ["decode"], id="prefill failed"),
        pytest.param({"prefill": FOUND, "decode": FOUND}, [], id="decode done"),
        pytest.param({"prefill": FOUND, "decode": FAILED}, [], id="decode failed"),
    ],
)
def test_steps_prefill_first(results: dict[str, ProfileResult | None], picked: list[str]) -> None:
    """Source: disagg_profile_handler_test.go, TestHandler_Pick_PrefillFirst_PD."""
    first = handler(stageOrder="prefill-first")
    assert first.pick(asked(8), ["prefill", "decode"], results, span()) == picked


def test_profiles_of_other_names() -> None:
    """Source: disagg_profile_handler_test.go, TestHandler_Pick_CustomProfiles, ..._ProcessResults_CustomProfiles."""
    made = handler(True, profiles={"decode": "my-decode", "prefill": "my-prefill"})
    names = ["my-decode", "my-prefill"]
    assert made.pick(asked(8), names, {}, span()) == ["my-decode"]
    assert made.pick(asked(8), names, {"my-decode": FOUND}, span()) == ["my-prefill"]
    result = made.process(asked(8), {"my-decode": FOUND, "my-prefill": FOUND})
    assert (result.primary, set(result.profiles)) == ("my-decode", set(names))


def test_results() -> None:
    """Source: disagg_profile_handler_test.go, TestHandler_ProcessResults_PD."""
    assert set(handler().process(asked(8), {"decode": FOUND}).profiles) == {"decode"}
    assert set(handler().process(asked(8), {"decode": FOUND, "prefill": FAILED}).profiles) == {"decode"}
    assert set(handler().process(asked(8), {"decode": FOUND, "prefill": FOUND}).profiles) == {"decode", "prefill"}
    for results in ({"decode": FAILED}, {}):
        with pytest.raises(RequestError, match="failed to find available decode workers") as caught:
            handler().process(asked(8), results)
        assert caught.value.status == 429


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ({}, "decode-first"),
        ({"stageOrder": ""}, "decode-first"),
        ({"stageOrder": "decode-first"}, "decode-first"),
        ({"stageOrder": "DecodeFirst"}, "decode-first"),
        ({"stageOrder": "prefill-first"}, "prefill-first"),
        ({"stageOrder": "PrefillFirst"}, "prefill-first"),
        ({"stageOrder": "prefill_first"}, "prefill-first"),
        ({"decodeProfile": "decode", "stageOrder": "prefill-first"}, "prefill-first"),
    ],
)
def test_stage_order(given: dict[str, Any], order: str) -> None:
    """Source: disagg_profile_handler_test.go, TestHandler_Factory_StageOrder."""
    assert DisaggProfileHandlerParameters.model_validate(given).stage_order == order


@pytest.mark.parametrize(
    ("given", "profiles", "decider"),
    [
        ({}, ("decode", "prefill"), ""),
        ({"profiles": {"decode": "", "prefill": ""}, "deciders": {"prefill": ""}}, ("decode", "prefill"), ""),
        ({"deciders": {"prefill": "p"}}, ("decode", "prefill"), "p"),
        ({"profiles": {"decode": "d", "prefill": "e"}}, ("d", "e"), ""),
        ({"prefillDeciderPluginName": "p"}, ("decode", "prefill"), "p"),
        ({"deciderPluginName": "p"}, ("decode", "prefill"), "p"),
        ({"deciderPluginName": "p", "prefillDeciderPluginName": "q"}, ("decode", "prefill"), "q"),
        ({"prefillDeciderPluginName": "q", "deciderPluginName": "p"}, ("decode", "prefill"), "q"),
        ({"decodeProfile": "d", "prefillProfile": "e", "deciderPluginName": ""}, ("d", "e"), ""),
    ],
)
def test_parameters(given: dict[str, Any], profiles: tuple[str, str], decider: str) -> None:
    """Source: disagg_profile_handler_test.go, TestHandlerFactory and the tests of its deprecated flat parameters."""
    found = DisaggProfileHandlerParameters.model_validate(given)
    assert ((found.profiles.decode, found.profiles.prefill), found.deciders.prefill) == (profiles, decider)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stageOrder": "INVALID_ORDER"}, "Input should be 'decode-first' or 'prefill-first'"),
        ({"stageOrder": "prefill-first", "deciders": {"prefill": "p"}}, "remove deciders.prefill"),
        ({"stageOrder": "prefill-first", "deciderPluginName": "p"}, "remove deciders.prefill"),
        ({"profiles": {"decode": "decode"}, "unknownField": "x"}, "Extra inputs are not permitted"),
        ({"profiles": {"decode": "d"}, "decodeProfile": "d"}, "cannot stand beside their deprecated form"),
        ({"deciders": {"prefill": "p"}, "deciderPluginName": "p"}, "cannot stand beside their deprecated form"),
        ({"deciderPluginName": "p", "primaryPort": 8080}, "Extra inputs are not permitted"),
        ({"profiles": {"decode": "x", "prefill": "x"}}, "must be two scheduling profiles"),
        ({"deciders": {"encode": "always-disagg-multimodal-decider"}}, "has no stage encode"),
        ({"encodeDeciderPluginName": "e"}, "has no stage encode"),
        ({"profiles": {"encode": "encode"}}, "has no stage encode"),
        ({"profiles": ["decode"]}, "valid dictionary"),
        ({"keepTraces": ["because"]}, "Input should be 'uncached_at_or_above_threshold'"),
    ],
)
def test_parameters_that_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DisaggProfileHandlerParameters.model_validate(given)


# A picker as a whole


def content(**parameters: Any) -> dict[str, Any]:
    """The configuration with other parameters for the decider."""
    changed = copy.deepcopy(DISAGGREGATED)
    changed["plugins"][4]["parameters"] = parameters
    return changed


def always() -> dict[str, Any]:
    changed = copy.deepcopy(DISAGGREGATED)
    changed["plugins"][4] = {"type": "always-disagg-pd-decider"}
    changed["plugins"][5]["parameters"] = {"deciders": {"prefill": "always-disagg-pd-decider"}}
    return changed


def handled(**parameters: Any) -> dict[str, Any]:
    changed = copy.deepcopy(DISAGGREGATED)
    changed["plugins"][5]["parameters"] = parameters
    return changed


def ask(picker: Picker, prompt: str = LONG, **headers: str) -> Any:
    """Send a request; returns the answer to its headers, or the picker's own response."""
    exchange = picker.exchange()
    exchange.handle(request_headers(**headers))
    answer, *_ = exchange.handle(request_body(chat(prompt)))
    exchange.close()
    return answer


def explained(picker: Picker) -> dict[str, Any]:
    """What the last request's span says beyond llm-d."""
    last = [span for span in picker.spans if span.name == a.PD_SPAN][-1]
    return {key: value for key, value in last.attributes.items() if key.startswith("llmtrace.pd.")}


@pytest.fixture
def picker(tmp_path: Path) -> Picker:
    return Picker(tmp_path, DISAGGREGATED, [server("prefill", waiting=3), server("decode", waiting=2)])


def test_a_long_prompt_is_split(picker: Picker) -> None:
    answer = ask(picker)
    assert headers_set(answer)[a.DESTINATION_HEADER] == "10.2.0.1:8000"
    assert headers_set(answer)[a.PREFILLER_HEADER] == "10.1.0.1:8000"
    assert headers_removed(answer) == [a.ENCODERS_HEADER]
    assert explained(picker) == {
        a.PD_DECISION: "split",
        a.PD_REASON: "uncached_at_or_above_threshold",
        a.PD_DECIDER: "prefix-based-pd-decider",
        a.PD_PROMPT_TOKENS: 751,
        a.PD_CACHED_TOKENS: 0,
        a.PD_THRESHOLD_TOKENS: 512,
        a.PD_MINIMUM_PROMPT_TOKENS: 0,
        a.PD_DECODE_ENDPOINT: "default/decode-0",
        a.PD_PREFILL_ENDPOINT: "default/prefill-0",
        a.PD_DECODE_WAITING: 2,
        a.PD_PREFILL_WAITING: 3,
    }


def test_the_same_prompt_again_is_not(picker: Picker) -> None:
    ask(picker)
    answer = ask(picker)
    assert headers_set(answer)[a.DESTINATION_HEADER] == "10.2.0.1:8000"
    assert a.PREFILLER_HEADER not in headers_set(answer)
    assert explained(picker) == {
        a.PD_DECISION: "unified",
        a.PD_REASON: "uncached_below_threshold",
        a.PD_DECIDER: "prefix-based-pd-decider",
        a.PD_PROMPT_TOKENS: 751,
        a.PD_CACHED_TOKENS: 751,
        a.PD_THRESHOLD_TOKENS: 512,
        a.PD_MINIMUM_PROMPT_TOKENS: 0,
        a.PD_DECODE_ENDPOINT: "default/decode-0",
        a.PD_DECODE_WAITING: 2,
    }
    labels = {"plugin_name": "disagg-profile-handler", "plugin_type": "disagg-profile-handler", "model_name": "smol"}
    for decision in ("prefill-decode", "decode-only"):
        assert picker.value("llm_d_epp_disagg_decision_total", **labels, decision_type=decision) == 1
    filters = {"extension_point": "Filter", "plugin_type": "decode-filter", "plugin_name": "decode-filter"}
    assert picker.value("llm_d_epp_plugin_duration_seconds_count", **filters) == 2


@pytest.mark.parametrize(
    ("configured", "servers", "prompt", "reason", "decider"),
    [
        (content(nonCachedTokens=512), ["prefill", "decode"], SHORT, "uncached_below_threshold", True),
        (content(nonCachedTokens=20, promptTokens=100), ["prefill", "decode"], SHORT, "prompt_below_minimum", True),
        (content(), ["prefill", "decode"], LONG, "splitting_disabled", True),
        (content(nonCachedTokens=512), ["decode"], LONG, "no_prefill_endpoint", True),
        (always(), ["decode"], SHORT, "no_prefill_endpoint", True),
        (handled(), ["prefill", "decode"], LONG, "no_decider", False),
        (handled(stageOrder="prefill-first"), ["decode"], LONG, "no_prefill_endpoint", False),
    ],
)
def test_why_a_request_is_unified(
    tmp_path: Path, configured: dict[str, Any], servers: list[str], prompt: str, reason: str, decider: bool
) -> None:
    picker = Picker(tmp_path, configured, map(server, servers))
    answer = ask(picker, prompt, x_prefiller_host_port="10.66.6.6:1", x_encoder_hosts_ports="10.66.6.6:1")
    assert headers_set(answer)[a.DESTINATION_HEADER] == "10.2.0.1:8000"
    assert headers_removed(answer) == [a.PREFILLER_HEADER, a.ENCODERS_HEADER], "a client cannot choose the server"
    assert a.PREFILLER_HEADER not in headers_set(answer)
    told = explained(picker)
    assert (told[a.PD_DECISION], told[a.PD_REASON]) == ("unified", reason)
    assert (a.PD_DECIDER in told) == decider
    assert not {a.PD_PREFILL_ENDPOINT, a.PD_DECODE_WAITING, a.PD_PREFILL_WAITING} & told.keys()


@pytest.mark.parametrize("configured", [always(), handled(stageOrder="prefill-first")])
def test_every_request_is_split(tmp_path: Path, configured: dict[str, Any]) -> None:
    picker = Picker(tmp_path, configured, map(server, ["prefill", "decode"]))
    answer = ask(picker, SHORT)
    assert headers_set(answer)[a.PREFILLER_HEADER] == "10.1.0.1:8000"
    told = explained(picker)
    assert (told[a.PD_DECISION], told[a.PD_REASON]) == ("split", "always")
    assert not {a.PD_PROMPT_TOKENS, a.PD_CACHED_TOKENS, a.PD_THRESHOLD_TOKENS} & told.keys()


@pytest.mark.parametrize("servers", [["decode"], ["prefill", "decode"]])
def test_traces_are_marked_by_the_reason_of_their_decision(tmp_path: Path, servers: list[str]) -> None:
    parameters = {"deciders": {"prefill": "prefix-based-pd-decider"}, "keepTraces": ["no_prefill_endpoint"]}
    picker = Picker(tmp_path, handled(**parameters), map(server, servers))
    ask(picker)
    (span,) = (span for span in picker.spans if span.name == a.PD_SPAN)
    assert span.attributes.get(a.SAMPLING_KEEP) == (True if servers == ["decode"] else None)


def test_without_cache_data_nothing_is_split(tmp_path: Path) -> None:
    """A producer may find nothing out, for example without tokens."""
    picker = Picker(tmp_path, DISAGGREGATED, map(server, ["prefill", "decode"]))
    (producer,) = picker.configuration.producers
    producer.produce = lambda *_: None  # type: ignore[method-assign]
    producer.scheduled = lambda *_: None  # type: ignore[method-assign]
    ask(picker)
    told = explained(picker)
    assert (told[a.PD_REASON], told[a.PD_PROMPT_TOKENS], a.PD_CACHED_TOKENS in told) == ("no_prefix_data", 751, False)


@pytest.mark.parametrize(
    ("servers", "decode", "prefill"),
    [
        (["decode"], "decode-0", None),
        (["prefill", "decode"], "decode-0", "prefill-0"),
        (["prefill", "none"], "none-0", "prefill-0"),
        (["both"], "both-0", "both-0"),
    ],
)
def test_roles(tmp_path: Path, servers: list[str], decode: str, prefill: str | None) -> None:
    """Source: llm-d-router, disagg/scheduler_test.go, TestPDSchedule; a server without a role decodes."""
    endpoints = [server(role) for role in servers]
    for each in endpoints:
        if each.labels["llm-d.ai/role"] == "none":
            each.labels = {}
    picker = Picker(tmp_path, DISAGGREGATED, endpoints)
    ask(picker)
    told = explained(picker)
    assert told[a.PD_DECODE_ENDPOINT] == f"default/{decode}"
    assert told.get(a.PD_PREFILL_ENDPOINT) == (prefill and f"default/{prefill}")


def test_without_a_decode_server_429(tmp_path: Path) -> None:
    """Sources: llm-d-router v0.10.0, director.go (untyped errors of the scheduler) and disagg_profile_handler.go."""
    picker = Picker(tmp_path, DISAGGREGATED, [server("prefill")])
    response = ask(picker).immediate_response
    assert response.status.code == 429
    assert response.body == (
        b"inference error: ResourceExhausted - failed to find target endpoint: failed to find available decode workers"
    )
    assert [span.name for span in picker.spans if span.name == a.PD_SPAN] == []
    steps = [span.attributes for span in picker.spans if span.name == a.PD_PROFILE_SPAN]
    assert [step[a.PROFILE_DECISION] for step in steps] == ["run_decode", "complete"]
    assert [step.get(a.DECODE_FAILED) for step in steps] == [None, True]
    profile = picker.span(a.PROFILE_SPAN)
    assert [span.name for span in picker.spans if span.parent_id == profile.span_id] == [a.FILTER_SPAN]
    assert picker.span(a.FILTER_SPAN).attributes[a.FILTER_REMAINING] == 0
    attempts = {"status": "failure", "target_model_name": "smol", "endpoint_name": "", "namespace": "", "port": ""}
    assert picker.value("llm_d_epp_scheduler_attempts_total", **attempts) == 1


def test_a_filter_that_leaves_nothing_is_the_last_one_and_one_profile_fails_alike(tmp_path: Path) -> None:
    changed = copy.deepcopy(DISAGGREGATED)
    changed["plugins"] = [plugin for plugin in changed["plugins"] if "disagg" not in plugin["type"]]
    refs = ["prefill-filter", "decode-filter", "queue-scorer"]
    changed["schedulingProfiles"] = [{"name": "only", "plugins": [{"pluginRef": ref} for ref in refs]}]
    picker = Picker(tmp_path, changed, [server("decode")])
    response = ask(picker).immediate_response
    assert response.status.code == 429
    assert response.body.endswith(b"failed to run scheduler profile 'only'")
    for kind, count in (("prefill-filter", 1), ("decode-filter", 0)):
        labels = {"extension_point": "Filter", "plugin_type": kind, "plugin_name": kind}
        assert picker.value("llm_d_epp_plugin_duration_seconds_count", **labels) == count


def test_the_modalities_of_a_prompt(picker: Picker) -> None:
    """Source: llm-d-router, tokenizer/estimate.go (kinds of blocks) and observability/multimodal/multimodal.go."""
    blocks = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/b.png"}},
        {"type": 7},
    ]
    ask(picker, blocks)  # type: ignore[arg-type]
    attributes = picker.span(a.PD_SPAN).attributes
    assert (attributes[a.MM_MODALITY], attributes[a.MM_HASH_COUNT]) == ("audio,image", 3)


def test_headers_of_the_picker_never_come_from_a_client(tmp_path: Path) -> None:
    """llm-d's EPP leaves a client's header in place: it forgets the header, but does not have Envoy remove it."""
    single = Picker(tmp_path)
    answer = ask(single, x_prefiller_host_port="10.66.6.6:1")
    assert headers_removed(answer) == [a.PREFILLER_HEADER, a.ENCODERS_HEADER]
    (answer,) = single.exchange().handle(request_headers(end_of_stream=True, x_prefiller_host_port="10.66.6.6:1"))
    assert headers_removed(answer) == [a.PREFILLER_HEADER, a.ENCODERS_HEADER]


def test_a_fault_of_a_plugin_fails_no_request(picker: Picker, monkeypatch: pytest.MonkeyPatch) -> None:
    (producer,) = picker.configuration.producers

    def fault(*_: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(producer, "scheduled", fault)
    answer = ask(picker)
    assert headers_set(answer)[a.DESTINATION_HEADER] in ("10.1.0.1:8000", "10.2.0.1:8000")
    assert picker.span(a.ORCHESTRATION_SPAN).status == "ERROR"


def test_nothing_is_computed_for_spans_that_nobody_gets(tmp_path: Path) -> None:
    picker = Picker(tmp_path, DISAGGREGATED, [server("prefill"), server("decode"), endpoint(0)])
    unsampled = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-00"}
    exchange = picker.exchange(unsampled)
    exchange.handle(request_headers())
    answer, *_ = exchange.handle(request_body(chat(LONG)))
    exchange.close()
    assert headers_set(answer)[a.PREFILLER_HEADER] == "10.1.0.1:8000"
    assert picker.spans == []
