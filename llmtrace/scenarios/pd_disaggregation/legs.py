"""What the sidecar and the model servers did with a request: its legs, and in each the phases of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmtrace.scenarios.facts import integer, number, text
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Span, Trace

Leg = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Load:
    """The KV that a decode server brought from elsewhere.

    ``wait_ms`` is what the request waited for it, up to the engine step that noticed its arrival; ``transfer_ms`` the
    transfer alone. None where the trace does not tell.
    """

    wait_ms: float
    transfer_ms: float | None
    tokens: int | None
    blocks: int | None
    bytes: int | None
    failed: bool
    remote_engine_id: str


@dataclass(frozen=True)
class Engine:
    """A request in one model server. ``queue_ms`` and ``prefill_ms`` without the load of KV; None: not told."""

    server: str
    engine_id: str
    prompt_tokens: int | None
    queue_ms: float | None
    prefill_ms: float | None
    computed_tokens: int | None
    local_cached_tokens: int | None
    external_cached_tokens: int | None
    longest_gap_ms: float | None
    load: Load | None


@dataclass(frozen=True)
class Legs:
    """``sidecar_split``: whether the sidecar was told to split, None where it sent no span.

    ``prefill`` is the server of the prefill leg, None where there is none; ``decode`` is the one that gave the answer.
    """

    sidecar_split: bool | None
    prefill: Engine | None
    decode: Engine | None


def read_legs(trace: Trace) -> Legs:
    """The legs of a request, from llm-d's sidecar and the kit's."""
    forward = next((s for s in trace.spans if s.name == a.FORWARD_SPAN and s.service == a.SIDECAR_SERVICE), None)
    told = forward.attributes.get(a.PD_SPLIT) if forward else None
    by_leg: dict[Leg, Span] = {}
    for span in trace.spans:
        if span.name == a.SERVER_SPAN and span.service == a.SERVER_SERVICE:
            by_leg[_leg(trace, span)] = span  # of repeated calls the last one counts
    return Legs(
        sidecar_split=told if isinstance(told, bool) else None,
        prefill=_engine(trace, by_leg["prefill"]) if "prefill" in by_leg else None,
        decode=_engine(trace, by_leg["decode"]) if "decode" in by_leg else None,
    )


def _leg(trace: Trace, span: Span) -> Leg:
    """To which leg a model server's span belongs: the sidecar's nearest span above tells."""
    for above in trace.ancestors(span):
        if above.service == a.SIDECAR_SERVICE:
            name = above.name.rpartition(".")[2]  # some connectors say llm_d.pd_proxy.prefill
            if name == a.PD_PREFILL_SPAN:
                return "prefill"
            if name in (a.PD_DECODE_SPAN, a.FORWARD_SPAN):
                return "decode"
    return "decode"


def _engine(trace: Trace, request: Span) -> Engine:
    phases: dict[str, list[Span]] = {}
    for child in trace.children(request):
        phases.setdefault(child.name, []).append(child)
    prefill = phases.get(a.PREFILL_SPAN, [None])[-1]
    decode = phases.get(a.DECODE_SPAN, [None])[-1]
    of_prefill = prefill.attributes if prefill else {}
    return Engine(
        server=request.instance,
        engine_id=text(request.attributes.get(a.ENGINE_ID)),
        prompt_tokens=integer(request.attributes.get(a.VLLM_PROMPT_TOKENS)),
        queue_ms=sum(s.duration_ms for s in phases[a.QUEUE_SPAN]) if a.QUEUE_SPAN in phases else None,
        prefill_ms=prefill.duration_ms if prefill else None,
        computed_tokens=integer(of_prefill.get(a.COMPUTED_TOKENS)),
        local_cached_tokens=integer(of_prefill.get(a.LOCAL_CACHED_TOKENS)),
        external_cached_tokens=integer(of_prefill.get(a.EXTERNAL_CACHED_TOKENS)),
        longest_gap_ms=number(decode.attributes.get(a.TOKEN_GAP_MAX)) if decode else None,
        load=_load(phases.get(a.KV_LOAD_SPAN, [])),
    )


def _load(spans: list[Span]) -> Load | None:
    if not spans:
        return None
    last = spans[-1].attributes
    return Load(
        wait_ms=sum(s.duration_ms for s in spans),
        transfer_ms=number(last.get(a.KV_LOAD_TRANSFER_TIME)),
        tokens=integer(last.get(a.KV_LOAD_TOKENS)),
        blocks=integer(last.get(a.KV_LOAD_BLOCKS)),
        bytes=integer(last.get(a.KV_LOAD_BYTES)),
        failed=last.get(a.KV_LOAD_FAILED) is True,
        remote_engine_id=text(last.get(a.KV_LOAD_REMOTE_ENGINE)),
    )
