"""What a request and 1,000 tokens cost, as far as metrics can tell."""

from __future__ import annotations

from grafana.board import YOURS, Board, Note, Panel, Query, Row, TextVariable, limits
from grafana.queries import PICKER, VLLM, per, rate

ENGINES = f"count by (instance, role) (vllm:num_requests_running{{{VLLM}}})"
"""Engines that Prometheus sees: each counts while it answers, whether it works or not."""
HELD = f"$accelerators * sum by (role) (sum_over_time(({ENGINES})[$__range:1m])) * 60"
"""Accelerator-seconds held in the dashboard's range."""
MONEY = "$price / 3600"


def now(metric: str) -> str:
    """Increase per second of one of vLLM's counters at each endpoint."""
    return rate(metric, VLLM, "instance, role")


def requests(metric: str) -> str:
    """Growth of one of the picker's counters in the dashboard's range."""
    return f"sum(increase({metric}{{{PICKER}}}[$__range]))"


TOKENS = f"({requests('llm_d_epp_request_input_tokens_sum')} + {requests('llm_d_epp_request_output_tokens_sum')})"

TOTAL = Row(
    "In this range, over all servers",
    (
        Panel(
            "Accelerator-seconds per request",
            "Accelerator-seconds held by all model servers, of whatever role, per request at the picker. Yellow from "
            "30 s, red from 120 s: a server that is busy shares its time among many requests.",
            "s",
            (Query(per(f"sum({HELD})", requests("llm_d_epp_request_total")), "per request"),),
            kind="stat",
            thresholds=limits(30, 120),
            width=6,
            height=5,
        ),
        Panel(
            "Accelerator-seconds per 1,000 tokens",
            "The same per 1,000 tokens, of prompts and generated, as the picker counts them. Yellow from 5 s: fewer "
            "than 200 tokens per second and accelerator.",
            "s",
            (Query(f"1000 * {per(f'sum({HELD})', TOKENS)}", "per 1,000 tokens"),),
            kind="stat",
            thresholds=limits(5, 30),
            width=6,
            height=5,
        ),
        Panel(
            "Price per 1,000 requests",
            "In the currency of the price that is set above.",
            "short",
            (
                Query(
                    f"1000 * {MONEY} * {per(f'sum({HELD})', requests('llm_d_epp_request_total'))}", "per 1,000 requests"
                ),
            ),
            kind="stat",
            no_limit=YOURS,
            width=6,
            height=5,
        ),
        Panel(
            "Price per 1,000,000 tokens",
            "Of prompts and generated, in the currency of the price that is set above.",
            "short",
            (Query(f"1000000 * {MONEY} * {per(f'sum({HELD})', TOKENS)}", "per 1,000,000 tokens"),),
            kind="stat",
            no_limit=YOURS,
            width=6,
            height=5,
        ),
    ),
)

ENDPOINTS = Row(
    "By endpoint and role",
    (
        Panel(
            "Accelerator-seconds per request by endpoint",
            "What each model server holds, per request that ends there. A split request ends at two of them: its cost "
            "is the sum of a prefill server's and a decode server's.",
            "s",
            (
                Query(
                    per(f"$accelerators * {ENGINES}", now("vllm:request_success_total")),
                    "{{role}} {{instance}}",
                ),
            ),
            thresholds=limits(30, 120),
            endpoint_label="instance",
        ),
        Panel(
            "Accelerator-seconds per 1,000 tokens by endpoint",
            "What each model server holds, per 1,000 tokens of prompts and answers that it works on. Cached prompt "
            "tokens count too, so that a warm cache makes tokens cheap.",
            "s",
            (
                Query(
                    per(
                        f"1000 * $accelerators * {ENGINES}",
                        f"({now('vllm:prompt_tokens_total')} + {now('vllm:generation_tokens_total')})",
                    ),
                    "{{role}} {{instance}}",
                ),
            ),
            thresholds=limits(5, 30),
            endpoint_label="instance",
        ),
        Panel(
            "Price per hour by role",
            "What the servers of each role cost an hour, in the currency of the price that is set above.",
            "short",
            (Query(f"$price * $accelerators * sum by (role) ({ENGINES})", "{{role}}"),),
            no_limit=YOURS,
            stacked=True,
            width=8,
        ),
        Panel(
            "Idle",
            "Share of the time, of the last five minutes, in which a model server had no request to run. It costs the "
            "same.",
            "percentunit",
            (
                Query(
                    f"avg_over_time((max by (instance, role) (vllm:num_requests_running{{{VLLM}}}) == bool 0)[5m:15s])",
                    "{{role}} {{instance}}",
                ),
            ),
            thresholds=limits(0.5, 0.9),
            maximum=1,
            width=8,
            endpoint_label="instance",
        ),
        Panel(
            "Accelerators by role",
            "Accelerators that the servers of each role hold.",
            "short",
            (Query(f"$accelerators * sum by (role) ({ENGINES})", "{{role}}"),),
            no_limit=YOURS,
            stacked=True,
            width=8,
        ),
    ),
)

LIMITS = Row(
    "What this can know",
    (
        Note(
            "What this can know, and what it cannot",
            "**It knows** how many engines answered at each moment, how many accelerators you say each has, and how "
            "many requests and tokens were served in that time. It divides one by the other: the cost of what is "
            "*held*, idle time included. Set `Accelerators per engine` (tensor parallel x pipeline parallel) and "
            "`Price` above.\n\n**It does not know** what one request used: requests share a batch, and metrics do not "
            "say how an engine's step is divided among them, nor by tenant. It does not know discounts, reserved "
            "capacity, or machines that stand by without a model server. A low price per token at an endpoint may "
            "come from short prompts or a warm cache rather than from good use.",
        ),
    ),
)

BOARD = Board(
    "llmtrace-cost",
    "LLM inference: cost",
    "Accelerator-seconds and money per request and per 1,000 tokens, by endpoint and role, from what metrics can tell.",
    (TOTAL, ENDPOINTS, LIMITS),
    scenarios=("prefix-cache", "pd-disaggregation"),
    variables=(
        TextVariable(
            "price", "Price per accelerator-hour", "What one accelerator costs an hour, in any currency.", "2.50"
        ),
        TextVariable(
            "accelerators",
            "Accelerators per engine",
            "Accelerators of one engine: tensor parallel size times pipeline parallel size.",
            "1",
        ),
    ),
)
