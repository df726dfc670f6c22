"""Wide expert parallelism: where steps spend their time, which rank others wait for, how even the experts' load is."""

from __future__ import annotations

from grafana.board import COLOURS, COMPARED, Board, JaegerTable, Panel, Query, Row, TraceTable, limits
from grafana.queries import DURATION, SERVER, quantile

WINDOW = "2m"
"""Of rates: workers send their sums every 10 or 15 seconds, whatever Prometheus' interval is."""
RANKS = 'k8s_namespace_name=~"$namespace",llmtrace_role=~"$role",service_instance_id=~"$endpoint"'
"""Series of ranks; their workers do not tell the model."""
TIME, STEPS, TOKENS = "llmtrace_step_time_seconds_total", "llmtrace_step_traced_total", "llmtrace_step_tokens_total"
LOAD = "llmtrace_moe_expert_load_total"
RANK, EXPERT = "llmtrace_rank_world", "llmtrace_moe_expert_id"
STRAGGLING = "llmtrace:rank_straggling:ratio_rate5m"
DUMMY = ',llmtrace_step_dummy="true"'
PADDING, WORK = ',llmtrace_step_work="padding"', ',llmtrace_step_work!="padding"'


def grows(metric: str, by: str = "", more: str = "") -> str:
    """Growth per second of ranks' sums, by labels."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{RANKS}{more}}}[{WINDOW}]))"


def share(part: str, whole: str) -> str:
    """Of series by labels, what they are of a whole without any; nothing where the whole is 0."""
    return f"{part} / on () group_left () ({whole} > 0)"


def map_of_ranks(title: str, description: str, phases: str) -> Panel:
    """The share of its steps that each rank spends in phases."""
    time = grows(TIME, RANK, f',llmtrace_step_phase=~"{phases}"')
    return Panel(
        title,
        f"{description} Share of its steps' time; a row is a rank. Nothing where vLLM replays CUDA graphs.",
        "percentunit",
        (Query(f"{time} / ({grows(TIME, RANK)} > 0)", "{{llmtrace_rank_world}}"),),
        kind="heatmap",
        no_limit=COLOURS,
        width=8,
        height=9,
    )


TIMES = Row(
    "Steps",
    (
        Panel(
            "A step by phase",
            "Share of the steps' time by phase. Dispatch, combine and wait hold the waiting for other ranks; other is "
            "what the layers leave, above all preparing the batch. Nothing where vLLM replays CUDA graphs.",
            "percentunit",
            (Query(share(grows(TIME, "llmtrace_step_phase"), grows(TIME)), "{{llmtrace_step_phase}}"),),
            no_limit=COMPARED,
            stacked=True,
            maximum=1,
        ),
        Panel(
            "Length of a step",
            "Seconds of a traced step on one rank. An exemplar leads to the step's trace, with the spans of all ranks.",
            "s",
            tuple(
                Query(
                    quantile(part, DURATION, f'service_name="vllm",span_name="engine_step",{SERVER}', "llmtrace_role"),
                    f"p{part * 100:g} {{{{llmtrace_role}}}}",
                    exemplars=part > 0.5,
                )
                for part in (0.5, 0.95)
            ),
            thresholds=limits(0.1, 0.2),
            width=6,
        ),
        Panel(
            "For nobody",
            "Share of the steps that a rank ran only because others had requests, and share of the tokens that were "
            "computed so that all ranks have as many.",
            "percentunit",
            (
                Query(f"{grows(STEPS, more=DUMMY)} / ({grows(STEPS)} > 0)", "steps"),
                Query(f"{grows(TOKENS, more=PADDING)} / ({grows(TOKENS)} > 0)", "tokens"),
            ),
            thresholds=limits(0.3, 0.6),
            maximum=1,
            width=6,
        ),
    ),
)

STRAGGLERS = Row(
    "Ranks",
    (
        Panel(
            "Who is waited for",
            "Share of a step that the other ranks spend in collectives longer than this rank does: they wait for it. "
            "The ranks for which it is more than 1 %; the alert LLMRankStraggles goes by the same number.",
            "percentunit",
            (
                Query(
                    f"max by ({RANK}, llmtrace_rank_node, llmtrace_role) ({STRAGGLING}{{{RANKS}}}) > 0.01",
                    "{{llmtrace_role}} rank {{llmtrace_rank_world}} on {{llmtrace_rank_node}}",
                    may_be_empty="no rank is waited for where all are equally fast, and rules take minutes to tell",
                ),
            ),
            thresholds=limits(0.05, 0.1),
            height=9,
        ),
        Panel(
            "Work by rank",
            "Tokens that a rank computes for requests in a step, in the mean; a row is a rank. One that is waited for "
            "and has no more of them than others is slow for another reason.",
            "short",
            (Query(f"{grows(TOKENS, RANK, WORK)} / ({grows(STEPS, RANK)} > 0)", "{{llmtrace_rank_world}}"),),
            kind="heatmap",
            no_limit=COLOURS,
            height=9,
        ),
        map_of_ranks("Experts by rank", "Computing the rank's experts.", "experts"),
        map_of_ranks("Attention by rank", "Between MoE layers, and what the layers leave.", "attention|other"),
        map_of_ranks(
            "Collectives by rank",
            "Dispatch, combine and other collectives. The rank with least is the one that the others wait for.",
            "dispatch|combine|wait",
        ),
    ),
)

EXPERTS = Row(
    "Experts",
    (
        Panel(
            "Load of the experts",
            "Tokens that an expert gets, in multiples of the mean; a row is an expert by its logical id. Where ranks "
            "times experts are more than 16,384, by a sample of the ranks.",
            "short",
            (
                Query(
                    share(grows(LOAD, EXPERT), f"avg({grows(LOAD, EXPERT)})"),
                    "{{llmtrace_moe_expert_id}}",
                ),
            ),
            kind="heatmap",
            no_limit=COLOURS,
            height=11,
        ),
        Panel(
            "Imbalance of the experts",
            "Tokens of the fullest expert in multiples of the mean: 1 is even. The rank that has it computes longest.",
            "short",
            (Query(share(f"max({grows(LOAD, EXPERT)})", f"avg({grows(LOAD, EXPERT)})"), "fullest / mean"),),
            thresholds=limits(2, 4),
            width=6,
            height=11,
        ),
        Panel(
            "Full experts",
            "Experts that get more than one and a half times the mean, in multiples of it.",
            "short",
            (
                Query(
                    f"{share(grows(LOAD, EXPERT), f'avg({grows(LOAD, EXPERT)})')} > 1.5",
                    "expert {{llmtrace_moe_expert_id}}",
                    may_be_empty="no expert gets so much where the load is even",
                ),
            ),
            thresholds=limits(2, 4),
            width=6,
            height=11,
        ),
    ),
)

TRACES = Row(
    "Traces",
    (
        TraceTable(
            "Long steps",
            "The newest steps of more than 100 ms. A trace has the spans of all ranks, with their links to requests.",
            '{ name = "engine_step" && duration > 100ms }',
            width=8,
        ),
        TraceTable(
            "Experts moved",
            "Steps within which experts moved to other ranks (EPLB).",
            '{ name = "engine_step" && span.llmtrace.moe.rearrangements > 0 }',
            width=8,
        ),
        TraceTable(
            "Steps with requests waiting",
            "Steps after which more than eight requests were still in the queue of a rank's engine.",
            '{ name = "engine_step" && span.llmtrace.step.waiting_requests > 8 }',
            width=8,
        ),
    ),
)

JAEGER = Row(
    "Traces in Jaeger",
    (
        JaegerTable(
            "Long steps (Jaeger)",
            "The same in Jaeger.",
            service="vllm",
            operation="engine_step",
            min_duration="100ms",
        ),
    ),
    collapsed=True,
)

BOARD = Board(
    "llmtrace-wide-ep",
    "LLM inference: wide expert parallelism",
    "What the steps of a mixture of experts spend their time on, which rank the others wait for, and how even the load "
    "of the experts is. Choose one group of ranks by role and endpoint, if there are several.",
    (TIMES, STRAGGLERS, EXPERTS, TRACES, JAEGER),
    scenarios=("wide-ep",),
)
