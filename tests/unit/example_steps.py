"""Made-up steps of ranks on nodes: work of each rank, and the waiting that follows from it; and requests with links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llmtrace.semconv import attributes as a
from llmtrace.traces.model import AttributeValue, Link, Span, Trace

START_NS = 1_700_000_000_000_000_000
STEP_NS = 50_000_000
ATTENTION_MS, EXPERTS_MS, TRANSFER_MS, OTHER_MS = 4.0, 6.0, 0.5, 1.0


def step(
    number: int,
    ranks: int,
    *,
    ranks_per_node: int = 8,
    attention_ms: Mapping[int, float] | None = None,
    experts_ms: Mapping[int, float] | None = None,
    other_ms: Mapping[int, float] | None = None,
    clock_ms: Mapping[int, float] | None = None,
    tokens: Sequence[int] = (),
    late_ms: Mapping[int, float] | None = None,
    pods: Mapping[int, str] | None = None,
    phased: bool = True,
    reason: str = a.REASON_SAMPLED,
) -> Trace:
    """The trace of a step. Times are the work of single ranks where it is not the usual; ``clock_ms`` is how far the
    clock of a node is ahead; ``tokens`` are those that every rank sent to each expert. ``late_ms`` is how much later a
    rank begins. ``pods`` are those of nodes. A step that is not ``phased`` is a replayed CUDA graph.

    The other ranks begin together. Before the experts and after them stands a collective, which takes TRANSFER_MS from
    the moment at which the last rank comes to it.
    """
    late = [(late_ms or {}).get(r, 0.0) for r in range(ranks)]
    before = [
        late[r] + (attention_ms or {}).get(r, ATTENTION_MS) + (other_ms or {}).get(r, OTHER_MS) for r in range(ranks)
    ]
    experts = [(experts_ms or {}).get(r, EXPERTS_MS) for r in range(ranks)]
    dispatched = max(before) + TRANSFER_MS
    combined = dispatched + max(experts) + TRANSFER_MS
    spans = []
    for r in range(ranks):
        node = r // ranks_per_node
        start = START_NS + number * STEP_NS + round((clock_ms or {}).get(node, 0.0) * 1e6)
        attributes: dict[str, AttributeValue] = {
            a.WORLD_RANK: r,
            a.DP_RANK: r,
            a.NODE: f"node-{node}",
            a.STEP_RANKS: ranks,
            a.STEP_DUMMY: False,
            a.STEP_REASON: reason,
            a.STEP_PREFILL_TOKENS: 0,
            a.STEP_DECODE_TOKENS: 4,
            a.STEP_PADDED_TOKENS: 0,
        }
        if phased:
            attributes |= {
                a.STEP_ATTENTION: (attention_ms or {}).get(r, ATTENTION_MS),
                a.STEP_DISPATCH: dispatched - before[r],
                a.STEP_EXPERTS: experts[r],
                a.STEP_COMBINE: combined - dispatched - experts[r],
                a.STEP_WAIT: 0.0,
                a.SLOWEST_LAYER: 0,
                a.SLOWEST_LAYER_TIME: experts[r],
            }
        if tokens:
            attributes[a.EXPERT_TOKENS] = list(tokens)
        spans.append(
            Span(
                trace_id=f"{number + 1:032x}",
                span_id=f"{r + 1:016x}",
                parent_id=None,
                name=a.STEP_SPAN,
                kind="INTERNAL",
                start_ns=start + round(late[r] * 1e6),
                end_ns=start + round(combined * 1e6),
                attributes=attributes,
                resource={"service.name": a.SERVER_SERVICE} | ({a.POD_NAME: pods[node]} if pods else {}),
            )
        )
    return Trace(f"{number + 1:032x}", tuple(spans))


def steps(count: int, ranks: int, **more: object) -> Iterator[Trace]:
    for number in range(count):
        yield step(number, ranks, **more)  # type: ignore[arg-type]


def request(number: int, engine: int, prefill: list[Trace], decode: list[Trace], tokens: int = 8) -> Trace:
    """A request's trace: the client's span, and the engine's with links to steps."""
    trace_id = f"{number:08x}" + "f" * 24

    def span(index: int, name: str, service: str, linked: list[Trace], **attributes: object) -> Span:
        return Span(
            trace_id=trace_id,
            span_id=f"{index:016x}",
            parent_id=None if index == 1 else f"{1:016x}",
            name=name,
            kind="CLIENT" if index == 1 else "INTERNAL",
            start_ns=START_NS + index,
            end_ns=START_NS + index + 1000,
            attributes=attributes,  # type: ignore[arg-type]
            resource={"service.name": service},
            links=tuple(Link(t.trace_id, f"{engine + 1:016x}") for t in linked),
        )

    client = {a.RUN_ID: "r", a.ARM: "balanced", a.PAIR_ID: str(number), a.BLOCK: 0, a.TENANT: "library"}
    engine_facts = {a.DP_RANK: engine, a.COMPUTED_TOKENS: tokens, a.PREFILL_CHUNKS: max(len(prefill), 1)}
    return Trace(
        trace_id,
        (
            span(1, "chat tiny-moe", a.CLIENT_SERVICE, [], **client),
            span(2, a.PREFILL_SPAN, a.SERVER_SERVICE, prefill, **engine_facts),
            span(3, a.DECODE_SPAN, a.SERVER_SERVICE, decode, **{a.DP_RANK: engine}),
        ),
    )


def block(requests: int) -> Trace:
    attributes = {a.RUN_ID: "r", a.ARM: "balanced", a.BLOCK: 0, a.BLOCK_REQUESTS: requests, a.REQUEST_MODEL: "tiny-moe"}
    span = Span("b" * 32, "b" * 16, None, a.BLOCK_SPAN, "INTERNAL", START_NS, START_NS + 1, attributes=attributes)
    return Trace("b" * 32, (span,))
