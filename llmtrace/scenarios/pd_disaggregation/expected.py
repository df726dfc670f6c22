"""The traces that the scenario's requests must produce: one tree each, of one of three forms."""

from __future__ import annotations

from llmtrace.scenarios.expectation import Expectation, Fault, Problem
from llmtrace.scenarios.facts import read_request
from llmtrace.scenarios.pd_disaggregation.arms import NAME
from llmtrace.scenarios.pd_disaggregation.choice import SPLIT, UNIFIED
from llmtrace.scenarios.pd_disaggregation.faults import (
    Contradiction,
    decision_contradiction,
    load_contradiction,
    reason_contradiction,
    rule_contradiction,
)
from llmtrace.scenarios.pd_disaggregation.legs import read_legs
from llmtrace.scenarios.pd_disaggregation.requests import handled
from llmtrace.scenarios.pd_disaggregation.rule import decider_at
from llmtrace.scenarios.required import expectation
from llmtrace.semconv import attributes as a
from llmtrace.semconv.definitions import registry
from llmtrace.stack import Stack
from llmtrace.traces.model import Trace

SPLIT_WITHOUT_LOAD = "split_without_load"
"""Split although there was nothing to load: a vLLM that transfers only full KV blocks, and a prompt that lacks none."""
EXPECTATIONS = {form: expectation(registry(), NAME, form) for form in (SPLIT, SPLIT_WITHOUT_LOAD, UNIFIED)}


def expected(trace: Trace) -> Expectation:
    """What a trace must have, by its form: what the picker decided, else what the sidecar or the servers did."""
    legs = read_legs(trace)
    used = [s.attributes.get(a.EPP_PD_USED) for s in trace.named(a.PD_SPAN)]
    told = [split for split in (*used, legs.sidecar_split) if isinstance(split, bool)]
    if not (told[0] if told else legs.prefill is not None):
        return EXPECTATIONS[UNIFIED]
    nothing_to_load = legs.decode is not None and legs.decode.external_cached_tokens == 0
    return EXPECTATIONS[SPLIT_WITHOUT_LOAD if nothing_to_load else SPLIT]


def is_complete(trace: Trace) -> bool:
    """Whether a trace has what the answer reads: the client, the choice, the sidecar, and each leg's server."""
    if not any(s.service == a.CLIENT_SERVICE for s in trace.spans):
        return False
    if any(s.status == "ERROR" for s in trace.spans):
        return True
    legs = read_legs(trace)
    whole = legs.decode is not None and (legs.prefill is not None or not legs.sidecar_split)
    return (
        whole and legs.sidecar_split is not None and bool(trace.named(a.PD_SPAN)) and bool(trace.named(a.GATEWAY_SPAN))
    )


def contradictions(trace: Trace, arm: str, stack: Stack) -> list[Problem]:
    """What the picker, the sidecar and the servers say that cannot all be so; ``arm`` is the request's gateway."""
    served = read_request(trace)
    if served is None:
        return []
    picker = stack.pickers.get(arm)
    request = handled(trace, served, decider_at(picker.config) if picker else None)
    roles = {server.name: server.role for server in stack.servers}
    found = (
        (Fault.DECISION, decision_contradiction(request, roles)),
        (Fault.DECISION, load_contradiction(request, stack.kv_block_size)),
        (Fault.REASON, rule_contradiction(request)),
        (Fault.REASON, reason_contradiction(request, stack.kv_block_size)),
    )
    return [_problem(trace, fault, what) for fault, what in found if what is not None]


def _problem(trace: Trace, fault: Fault, found: Contradiction) -> Problem:
    hint = EXPECTATIONS[UNIFIED].hints.get(found.component, "")
    return Problem(trace_id=trace.trace_id, fault=fault, component=found.component, message=found.message, hint=hint)
