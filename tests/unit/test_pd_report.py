"""The pd-disaggregation report holds its numbers and plots, and needs nothing from the network."""

from __future__ import annotations

import html
import json
import re

import pytest
from example_pd_traces import pd_run, pd_trace
from rich.console import Console
from test_report import Tags

from llmtrace.scenarios.pd_disaggregation.answer import PdAnswer, answer
from llmtrace.scenarios.pd_disaggregation.report import pd_html
from llmtrace.scenarios.pd_disaggregation.text import MOST_EACH, answer_text, examples

RUN = pd_run(lambda uncached, split: 200 + 0.6 * uncached - (0.3 * (uncached - 512) if split else 0))


@pytest.fixture(scope="module")
def found() -> PdAnswer:
    return answer("run-1", RUN)


def test_the_report_is_self_contained_and_has_every_request(found: PdAnswer) -> None:
    page = pd_html(found)
    reader = Tags()
    reader.feed(page)
    assert reader.remote == []
    assert not re.search(r"""\bimport\s*\(?\s*["']https?:""", page)
    assert html.escape(found.verdict) in page
    for request in found.requests:
        assert request.trace_id in page
        assert html.escape(request.sentence) in page


def test_the_charts_show_decisions_pairs_transfers_and_the_curve(found: PdAnswer) -> None:
    page = pd_html(found)
    match = re.search(r'vegaEmbed\("#plots", (.*), \{actions', page)
    assert match is not None
    data = list(json.loads(match[1])["datasets"].values())
    by_columns = {tuple(sorted(r[0])): r for r in data if r}
    decisions = by_columns["arm", "reason", "requests", "served"]
    assert sum(r["requests"] for r in decisions) == 3 * 96
    pairs = by_columns["against", "by-threshold", "forced", "pair", "reason", "served"]
    assert len(pairs) == 2 * 96
    transfers = by_columns["MB", "ms", "share", "to", "trace"]
    assert len(transfers) == sum(t.transfers for t in found.transfers)
    curves = [r for r in data if r and "choices" in r[0]]
    assert len(curves) == 2
    assert [len(c) - 1 for c in curves] == [len(t.curve) for t in found.thresholds]
    assert min(row["lost"] for row in curves[0]) == 0


def test_names_from_traces_are_escaped(found: PdAnswer) -> None:
    evil = "</script><script>alert(1)</script>"
    requests = [found.requests[0].model_copy(update={"pair_id": evil, "sentence": evil}), *found.requests[1:]]
    assert "<script>alert(1)" not in pd_html(found.model_copy(update={"model": evil, "requests": requests}))


def test_a_single_request_has_a_report_and_a_text_too() -> None:
    alone = answer("run-1", [pd_trace(split=False, reason="no_decider", plugin=False)])
    assert "Too few requests" in pd_html(alone)
    console = Console(width=200)
    with console.capture() as captured:
        for part in answer_text(alone):
            console.print(part)
    assert "no KV was transferred" in captured.get()


def test_the_text_shows_some_requests_of_each_reason_the_dearest_first(found: PdAnswer) -> None:
    mine = [r for r in found.requests if r.arm == "by-threshold"]
    shown = examples(mine)
    assert {r.reason for r in shown} == {r.reason for r in mine}
    assert len(shown) == 2 * MOST_EACH
    for reason in {r.reason for r in mine}:
        lost = [r.lost_ttft_ms for r in shown if r.reason == reason]
        assert lost[0] == max(r.lost_ttft_ms or 0.0 for r in mine if r.reason == reason)


def test_tables_fit_a_pipe(found: PdAnswer) -> None:
    console = Console(width=150)
    with console.capture() as captured:
        for part in answer_text(found):
            console.print(part)
    lines = captured.get().splitlines()
    assert sum("prefill-0" in line and "MB/s" in line for line in lines) == 2, "each transfer on one line"
    assert any(line.startswith("by-threshold") and "uncached at or above threshold" in line for line in lines)
