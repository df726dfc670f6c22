"""The answer's conclusion, in one or two sentences."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrace.scenarios.pd_disaggregation.arms import ALWAYS_SPLIT, BY_THRESHOLD, NEVER_SPLIT
from llmtrace.scenarios.pd_disaggregation.latency import ArmComparison
from llmtrace.scenarios.pd_disaggregation.regret import Metric, ThresholdAnswer

BASELINES = {NEVER_SPLIT: "never splitting", ALWAYS_SPLIT: "always splitting"}
METRIC_NAMES: dict[Metric, str] = {"ttft": "TTFT", "e2e": "end to end"}


def verdict(
    comparisons: Sequence[ArmComparison], thresholds: Sequence[ThresholdAnswer], disagreeing: Sequence[str]
) -> tuple[str, bool]:
    """The sentences, and whether the evidence supports anything."""
    mine = [c for c in comparisons if c.candidate == BY_THRESHOLD and c.metric == "TTFT"]
    if not mine:
        return "Too few requests were answered in all arms to compare them; run more blocks.", False
    if disagreeing:
        return f"The sources disagree ({'; '.join(disagreeing)}), so no conclusion is drawn.", False
    ttft = next((t for t in thresholds if t.metric == "ttft"), None)
    compared = " and ".join(_against(c) for c in mine)
    sentences = f"Splitting by threshold, time to first token: {compared}."
    if ttft is not None:
        sentences += f" {threshold_sentence(ttft)}"
    supported = any(c.conclusion != "not supported" for c in mine)
    return sentences, supported or (ttft is not None and ttft.conclusion == "improvement")


def _against(compared: ArmComparison) -> str:
    saved, name = compared.saved_ms, BASELINES[compared.baseline]
    interval = f"95 % interval {saved.low:+.0f} to {saved.high:+.0f} ms, {compared.pairs} pairs"
    if compared.conclusion == "not supported":
        return f"a difference from {name} is not supported (mean saving {saved.estimate:+.0f} ms, {interval})"
    word = "improves on" if compared.conclusion == "improvement" else "is worse than"
    return f"{word} {name} (mean saving {saved.estimate:+.0f} ms, {interval})"


def threshold_sentence(found: ThresholdAnswer) -> str:
    """Which threshold would have been best, and whether that matters."""
    configured = "the configured threshold" if found.configured is None else f"the configured {found.configured:,}"
    saved = found.saved_ms
    interval = f"{saved.estimate:+.0f} ms a request, 95 % interval {saved.low:+.0f} to {saved.high:+.0f} ms"
    if not found.determined:
        which = "The data do not determine the best threshold: its interval holds everything from always to never"
    else:
        which = f"The best threshold is {_range(found.best_low, found.best_high)}"
        if (found.low, found.high) != (found.best_low, found.best_high):
            which += f" (95 % interval {_range(found.low, found.high)})"
    if found.conclusion == "improvement":
        return f"{which}; {configured} lost time against it ({interval})."
    return f"{which}; that {configured} lost time is not supported ({interval})."


def _range(low: int, high: int | None) -> str:
    """Thresholds from ``low`` to ``high``; without an upper end nothing is split."""
    if high is None:
        return f"{low:,} or more" if low > 1 else "any"
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"
