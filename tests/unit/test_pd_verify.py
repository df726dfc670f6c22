"""The check of a trace that may be split or not: good ones pass in both shapes, all damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_pd_traces import DECIDERS, KV_BLOCK, PORTS, ROLES, SERVERS, pd_block, pd_trace
from example_stack import STACK
from example_traces import MS, changed
from hypothesis import given
from hypothesis import strategies as st
from test_scenario_runs import store

from llmtrace.scenarios.expectation import Fault, Problem, verify_trace
from llmtrace.scenarios.pd_disaggregation import SCENARIO
from llmtrace.scenarios.pd_disaggregation.expected import EXPECTATIONS, expected, is_complete
from llmtrace.scenarios.smoke import verify
from llmtrace.semconv.conformance import check as conformance
from llmtrace.semconv.definitions import registry
from llmtrace.stack import Stack
from llmtrace.traces.model import Span, Trace

UNIFIED = {"split": False, "reason": "uncached_below_threshold", "cached": 1536}
GOOD = {
    "split": pd_trace(),
    "unified": pd_trace(**UNIFIED),
    "split, llm-d": pd_trace(upstream=True),
    "unified, llm-d": pd_trace(upstream=True, **UNIFIED),
    "split, short": pd_trace(arm="always-split", reason="always", prompt=KV_BLOCK - 1, ttft_ms=200.0),
    "split, nothing to transfer": pd_trace(arm="always-split", reason="always", cached=1632, whole_blocks=True),
    "split, less than a block": pd_trace(
        arm="always-split", reason="always", prompt=20, ttft_ms=200.0, whole_blocks=True
    ),
}
SPLIT = GOOD["split"]
INDEX = st.integers(0, len(SPLIT.spans) - 1)


def component(span: Span) -> str:
    """Who sends a span, as the registry has it: vLLM and the plugin in it share a service."""
    declared = registry().span(span.service, span.name, span.kind)
    assert declared is not None
    return declared.emitter.component


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A stack of this topology, whose pickers' files are those of the arms."""
    folder = tmp_path_factory.mktemp("pickers")
    picker = STACK["pickers"]["random"]  # type: ignore[index]
    for arm, (kind, threshold, minimum) in DECIDERS.items():
        decider = {"type": kind, "parameters": {"nonCachedTokens": threshold, "promptTokens": minimum}}
        handler = {"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": kind}}}
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump({"plugins": [decider, handler]}))
    servers = [
        {"name": name, "url": f"http://127.0.0.1:{PORTS[name]}", "process": name, "role": role}
        for name, role in zip(SERVERS, ROLES, strict=True)
    ]
    changes = {
        "scenario": "pd-disaggregation",
        "servers": servers,
        "pickers": {arm: {**picker, "config": str(folder / f"{arm}.yaml")} for arm in DECIDERS},
    }
    return Stack.model_validate({**STACK, **changes})


def problems(trace: Trace, stack: Stack | None = None, arm: str = "by-threshold") -> list[Problem]:
    found = verify_trace(trace, expected(trace))
    return found + (SCENARIO.further(trace, arm, stack) if stack else [])


def arm_of(trace: Trace) -> str:
    return str(trace.roots[0].attributes["llmtrace.scenario.arm"])


@pytest.mark.parametrize("trace", GOOD.values(), ids=GOOD)
def test_good_traces_have_no_problem_and_conform(trace: Trace, stack: Stack) -> None:
    assert problems(trace, stack, arm_of(trace)) == []
    assert conformance([trace]).findings == []


def test_the_driver_s_block_conforms() -> None:
    assert conformance([pd_block(9, arm, 0, []) for arm in DECIDERS]).findings == []


def test_a_form_is_what_the_picker_decided_else_what_was_done() -> None:
    forms = {id(e): name for name, e in EXPECTATIONS.items()}

    def form(trace: Trace) -> str:
        return forms[id(expected(trace))]

    assert [form(t) for t in GOOD.values()] == ["split", "unified", "split", "unified", "split"] + [
        "split_without_load"
    ] * 2
    no_picker = Trace(SPLIT.trace_id, tuple(s for s in SPLIT.spans if s.service != "llm-d-epp"))
    assert form(no_picker) == "split"
    only_servers = Trace(SPLIT.trace_id, tuple(s for s in SPLIT.spans if s.service == "vllm"))
    assert form(only_servers) == "unified"
    assert form(Trace("f" * 32, ())) == "unified"


@pytest.mark.parametrize("form", ["split", "unified"])
@pytest.mark.parametrize("silenced", ["client", "envoy", "picker", "sidecar", "vllm", "engine"])
def test_a_silent_component_is_named_and_no_other(silenced: str, form: str, stack: Stack) -> None:
    """As with its tracing off: what is below hangs under what is above."""
    trace = GOOD[form]
    # Without vLLM's own span the plugin sends none.
    gone = [s for s in trace.spans if component(s) == silenced or (silenced, component(s)) == ("vllm", "engine")]
    silent = {s.span_id for s in gone}

    def above(span_id: str | None) -> str | None:
        while span_id in silent:
            span_id = trace.by_id[span_id].parent_id
        return span_id

    kept = [replace(s, parent_id=above(s.parent_id)) for s in trace.spans if s not in gone]
    found = problems(Trace(trace.trace_id, tuple(kept)), stack)
    assert {p.component for p in found if p.fault != Fault.ROOT} == {silenced}
    assert {p.fault for p in found} <= {Fault.MISSING, Fault.ROOT}


@given(INDEX)
def test_a_removed_span_is_blamed_on_its_component(index: int) -> None:
    gone = SPLIT.spans[index]
    found = problems(Trace(SPLIT.trace_id, SPLIT.spans[:index] + SPLIT.spans[index + 1 :]))
    optional = {"HTTP POST", "pick_disagg_profile", "run_scheduler_profile", "filter_endpoints", "pick_endpoints"}
    if gone.name in optional or gone.name == "queue":
        assert gone.name in {"pick_disagg_profile", "filter_endpoints", "pick_endpoints", "queue"} or found
    else:
        assert any(p.component == component(gone) for p in found), gone.name


@given(INDEX, st.integers(11, 10**6), st.booleans())
def test_a_span_outside_of_its_parents_time_is_named(index: int, excess_ms: int, early: bool) -> None:
    span = SPLIT.spans[index]
    parent = SPLIT.parent(span)
    may_end_late = span.name.startswith("llm_d.pd_proxy.") or (span.name == "decode" and span.service != "vllm")
    if parent is None or (may_end_late and not early):
        return  # a proxy is done after its client is; llm-d's decode leg outlives the leg above it
    start = parent.start_ns - excess_ms * MS if early else span.start_ns
    end = span.end_ns if early else parent.end_ns + excess_ms * MS
    spans = tuple(replace(s, start_ns=start, end_ns=end) if s is span else s for s in SPLIT.spans)
    found = [p for p in problems(Trace(SPLIT.trace_id, spans)) if p.fault == Fault.TIME]
    assert any(repr(span.name) in p.message for p in found)


@given(INDEX)
def test_a_duplicate_is_named(index: int) -> None:
    again = SPLIT.spans[index]
    (problem,) = [p for p in problems(Trace(SPLIT.trace_id, (*SPLIT.spans, again))) if p.fault == Fault.DUPLICATE]
    assert again.span_id in problem.message


def server_span(trace: Trace, instance: str) -> str:
    return next(s.span_id for s in trace.named("llm_request") if s.instance == instance)


@pytest.mark.parametrize(
    ("instance", "names", "under"),
    [
        ("prefill-0", ["queue"], " under 'llm_request' under 'prefill'"),
        ("prefill-0", ["prefill"], " under 'llm_request' under 'prefill'"),
        ("decode-0", ["queue"], " under 'llm_request' under 'decode'"),
        ("decode-0", ["kv_load"], ""),
        ("decode-0", ["prefill"], " under 'llm_request' under 'decode'"),
        ("decode-0", ["decode"], ""),
        ("prefill-0", ["llm_request", "queue", "prefill"], " under 'prefill'"),
        ("decode-0", ["llm_request", "queue", "kv_load", "prefill", "decode"], " under 'decode'"),
    ],
)
def test_a_missing_phase_is_named_with_its_server(instance: str, names: list[str], under: str) -> None:
    gone = [s for s in SPLIT.spans if s.instance == instance and s.name in names]
    found = problems(Trace(SPLIT.trace_id, tuple(s for s in SPLIT.spans if s not in gone)))
    sender = next(component(s) for s in gone if s.name == names[0])
    assert f"no span {names[0]!r} from {sender}{under}" in {p.message for p in found}
    assert {p.component for p in found} == {sender}


def test_a_unified_request_has_no_prefill_leg(stack: Stack) -> None:
    both = changed(
        SPLIT, "prepare_disaggregation", {"llm_d.epp.pd.disaggregation_used": False, "llmtrace.pd.decision": "unified"}
    )
    found = problems(both, stack)
    assert any(p.fault == Fault.DECISION and "the picker decided unified" in p.message for p in found)
    sidecar = changed(both, "forward_request", {"llm_d.pd_proxy.disaggregation_used": False})
    (problem,) = [p for p in problems(sidecar, stack) if p.fault == Fault.DECISION]
    assert problem.component == "sidecar"
    assert problem.message == "it is unified, but prefill-0 has a prefill leg of it"
    assert problem.hint


@pytest.mark.parametrize(
    ("changes", "component", "words"),
    [
        ({"split": False, "reason": "uncached_below_threshold"}, "picker", "recomputed it is uncached_at_or_above"),
        ({"believed": 1536}, "picker", "its own numbers uncached_below_threshold"),
        ({"cached": 1536, "believed": 0}, "picker", "decode-0 had 1536 cached, the picker believed 0 cached"),
        (
            {"split": False, "reason": "no_prefill_endpoint", "prefill_endpoints": 1},
            None,
            "",
        ),
    ],
)
def test_a_reason_that_does_not_follow_is_named(
    changes: dict[str, Any], component: str | None, words: str, stack: Stack
) -> None:
    found = [p for p in problems(pd_trace(**changes), stack) if p.fault == Fault.REASON]
    assert {p.component for p in found} == ({component} if component else set())
    assert any(words in p.message for p in found) or not component


def test_the_decider_is_that_of_the_configuration_not_the_picker_s_word(stack: Stack) -> None:
    """With a threshold of its own the picker's word is consistent, and still not what is configured."""
    trace = pd_trace(threshold=2000, split=False, reason="uncached_below_threshold")
    found = [p.message for p in problems(trace, stack) if p.fault == Fault.REASON]
    assert len(found) == 1
    assert "recomputed it is uncached_at_or_above_threshold" in found[0]


def test_llm_d_s_picker_is_held_to_its_decision(stack: Stack) -> None:
    wrong = pd_trace(upstream=True, split=False)
    (problem,) = [p for p in problems(wrong, stack) if p.fault == Fault.REASON]
    assert "recomputed it is uncached_at_or_above_threshold" in problem.message
    never = pd_trace(upstream=True, arm="never-split", split=False)
    assert problems(never, stack, "never-split") == []
    assert [p.fault for p in problems(pd_trace(upstream=True, arm="never-split"), stack, "never-split")] == [
        Fault.REASON
    ]


def test_prefilling_twice_is_named(stack: Stack) -> None:
    twice = changed(SPLIT, "prefill", {"llmtrace.prefill.computed_tokens": 1640})
    (problem,) = [p for p in problems(twice, stack) if p.fault == Fault.DECISION]
    assert problem.component == "vllm"
    assert problem.message == "decode-0 computed 1640 tokens that prefill-0 had computed"


def test_a_trace_is_complete_when_both_legs_are_there() -> None:
    for trace in GOOD.values():
        assert is_complete(trace)
        for n, gone in enumerate(trace.spans):
            rest = Trace(trace.trace_id, trace.spans[:n] + trace.spans[n + 1 :])
            if gone.name in (
                "chat smol",
                "llm_request",
                "forward_request",
                "prepare_disaggregation",
                "gateway.request",
            ):
                assert not is_complete(rest), gone.name
            elif gone.service in ("vllm", "llm-d-epp", "envoy"):
                assert is_complete(rest), gone.name
    failed = changed(pd_trace(), "chat smol", status="ERROR")
    assert is_complete(Trace(failed.trace_id, failed.spans[:1]))


def test_the_smoke_test_says_what_is_wrong_with_each_trace(stack: Stack) -> None:
    good, bad = pd_trace(number=1), pd_trace(number=2, believed=1536)
    sent = {good.trace_id: "by-threshold", bad.trace_id: "by-threshold"}
    result = verify(store(good, bad), sent, SCENARIO, stack, timeout_s=0.1)
    assert not result.ok
    assert [[p.fault for p in t.problems] for t in result.traces] == [[], [Fault.REASON]]
    assert verify(store(good), {good.trace_id: "by-threshold"}, SCENARIO, stack, timeout_s=1).ok


def test_a_stack_without_the_pickers_files_still_checks_the_picker_s_own_word(stack: Stack) -> None:
    lost = stack.model_copy(
        update={"pickers": {k: p.model_copy(update={"config": Path("/none")}) for k, p in stack.pickers.items()}}
    )
    assert problems(SPLIT, lost) == []
    assert problems(pd_trace(believed=1536), lost) != []
