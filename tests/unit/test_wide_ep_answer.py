"""The wide-ep answer, from made-up steps and the requests that link to them."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import typer
from example_steps import ATTENTION_MS, EXPERTS_MS, TRANSFER_MS, block, request, step, steps
from rich.console import Console
from test_scenario_runs import store
from typer.testing import CliRunner

from llmtrace import cli_scenarios
from llmtrace.scenarios import wide_ep
from llmtrace.scenarios.facts import Served
from llmtrace.scenarios.wide_ep.answer import WideEpAnswer, answer
from llmtrace.scenarios.wide_ep.requests import request_steps
from llmtrace.scenarios.wide_ep.steps import ATTRIBUTES, read_steps
from llmtrace.scenarios.wide_ep.text import answer_text
from llmtrace.scenarios.wide_ep.verify import _link_problems
from llmtrace.scenarios.wide_ep.workload import WideEpWorkload
from llmtrace.semconv import attributes as a
from llmtrace.traces.model import Trace

SLOW_MS = 20.0
RANKS = 4


@pytest.fixture
def found() -> WideEpAnswer:
    """Rank 2 is slow in the experts of every second step."""
    made = [
        step(n, RANKS, ranks_per_node=2, experts_ms={2: EXPERTS_MS + SLOW_MS * (n % 2)}, tokens=[9, 1, 0, 0])
        for n in range(10)
    ]
    asked = [request(1, 0, made[:1], made[1:5]), request(2, 2, made[5:6], made[6:])]
    return answer("r", [block(2), *asked, *made])


def test_the_answer_names_the_straggler_and_what_balance_would_save(found: WideEpAnswer) -> None:
    steps = found.steps
    assert (steps.steps, steps.ranks, steps.partial) == (10, RANKS, 0)
    first = max(steps.stragglers, key=lambda s: s.delay_ms)
    assert (first.rank, first.node, first.phase) == (2, "node-1", "experts")
    assert first.delay_ms == pytest.approx(SLOW_MS)
    assert steps.saving_ms == pytest.approx(5 * SLOW_MS * (1 - 1 / RANKS))
    assert steps.waited_ms == pytest.approx(5 * SLOW_MS * (1 - 1 / RANKS))
    assert "Waiting takes" in found.verdict
    assert all(check.ok for check in found.checks), found.checks


def test_time_by_rank_and_node_adds_up_to_the_steps(found: WideEpAnswer) -> None:
    assert [share.rank for share in found.steps.by_rank] == [*range(RANKS)]
    assert [share.node for share in found.steps.by_rank] == ["node-0", "node-0", "node-1", "node-1"]
    for share in (*found.steps.by_rank, *found.steps.by_node):
        assert sum(share.ms) == pytest.approx(share.step_ms)
    assert [(share.node, share.steps) for share in found.steps.by_node] == [("node-0", 20), ("node-1", 20)]
    slow = found.steps.by_rank[2]
    assert slow.ms[0] == pytest.approx(ATTENTION_MS)
    assert slow.ms[2] == pytest.approx(EXPERTS_MS + SLOW_MS / 2)
    assert slow.waited_ms == pytest.approx(0.0)


def test_what_each_request_waited_for(found: WideEpAnswer) -> None:
    waiting, slow = found.requests
    assert (waiting.rank, waiting.prefill_steps, waiting.decode_steps) == (0, 1, 4)
    assert waiting.waited_ms == pytest.approx(2 * SLOW_MS)  # of the steps 0 to 4 two are slow
    assert (slow.rank, slow.waited_ms) == (2, pytest.approx(0.0))
    assert waiting.ms[1] == pytest.approx(5 * TRANSFER_MS)
    lost = SLOW_MS * (1 - 1 / RANKS)
    assert waiting.imbalance_ms == pytest.approx(2 * lost)
    # Of 16 tokens a step it had 8 in the prefill's, where nothing was lost, and one in each other.
    assert waiting.caused_ms == pytest.approx(2 * lost / 16)
    assert slow.caused_ms == pytest.approx(lost * 8 / 16 + 2 * lost / 16)


def test_experts_and_ranks(found: WideEpAnswer) -> None:
    assert found.steps.experts is not None
    assert found.steps.experts.top[:2] == [0, 1]
    assert found.steps.sent == [[90, 10, 0, 0]] * RANKS


def test_steps_are_read_one_after_the_other() -> None:
    read: list[weakref.ref[Trace]] = []

    def traces() -> Iterator[Trace]:
        yield block(1)
        yield request(1, 0, [step(0, RANKS)], [step(n, RANKS) for n in range(1, 20)])
        for number in range(20):
            made = step(number, RANKS)
            read.append(weakref.ref(made))
            yield made
            del made
            assert sum(ref() is not None for ref in read) <= 2

    found = answer("r", traces())
    assert (found.steps.steps, len(found.requests)) == (20, 1)
    assert all(check.ok for check in found.checks), found.checks


def test_the_command_reads_the_steps_to_which_requests_link(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [step(n, RANKS) for n in range(40)]
    kept = store(block(1), request(1, 0, made[:1], made[1:30]), *made)
    monkeypatch.setattr(cli_scenarios, "TempoClient", lambda _url: kept)
    app = typer.Typer()
    app.command()(cli_scenarios.answer)
    done = CliRunner().invoke(app, ["wide-ep", "--run", "r", "--json", "--store", "x"], catch_exceptions=False)
    found = WideEpAnswer.model_validate_json(done.output)
    assert (found.steps.steps, len(found.requests)) == (30, 1)
    assert all(check.ok for check in found.checks), found.checks


def test_faults_of_steps_that_count_and_of_those_that_do_not() -> None:
    whole = step(0, RANKS)
    zero = replace(whole.spans[1], attributes={**whole.spans[1].attributes, **dict.fromkeys(ATTRIBUTES, 0.0)})
    untrue = Trace(whole.trace_id, (whole.spans[0], zero, *whole.spans[2:]))
    broken = Trace("c" * 32, step(1, RANKS).spans[:3])
    found = answer("r", [block(0), untrue, broken, step(2, RANKS)])
    assert (found.steps.steps, found.steps.partial) == (2, 1)
    (check,) = [check for check in found.checks if check.name.startswith("a step has every rank")]
    assert (check.ok, check.compared) == (False, 3)
    assert check.disagreements == [
        f"{broken.trace_id}: {RANKS} ranks stepped, and these sent no span: 3",
        f"{untrue.trace_id}: the phases of rank 1 take 0.0 ms, its step 12.0 ms",
    ]


def test_a_link_to_a_step_that_is_not_there_is_told() -> None:
    made = [step(n, RANKS) for n in range(3)]
    without = request(2, 0, [], [])
    found = answer("r", [block(2), request(1, 0, made[:1], made[1:]), without, made[0]])
    by_name = {check.name: check for check in found.checks}
    assert by_name["the steps that requests link to are there"].ok is False
    assert by_name["every request links to the steps that ran it"].disagreements == [f"{without.trace_id} (balanced)"]


def test_verify_reads_the_steps_to_which_a_request_links() -> None:
    whole, broken = step(0, RANKS), step(1, RANKS)
    broken = replace(broken, spans=broken.spans[:3])
    store = {t.trace_id: t for t in (whole, broken)}
    good = request(1, 0, [whole], [])
    assert list(_link_problems(good, store.get)) == []
    (missing,) = _link_problems(request(1, 0, [], []), store.get)
    assert missing.message == "no span links to a step of the engine"
    rank, absent = _link_problems(request(1, 0, [broken], [step(7, RANKS)]), store.get)
    assert rank.message.endswith(f"{RANKS} ranks stepped, and these sent no span: 3")
    assert "to which it links has no span" in absent.message


def test_steps_on_demand_count_for_requests_and_not_for_the_workload() -> None:
    """A slow phase of 20 steps is traced whole, of which the sample has one, and of the rest of the run nine."""
    sample = [step(n, RANKS, experts_ms={2: EXPERTS_MS + SLOW_MS * (n == 9)}) for n in range(10)]
    slow = [step(n, RANKS, experts_ms={2: EXPERTS_MS + SLOW_MS}, reason=a.REASON_ON_DEMAND) for n in range(10, 29)]
    asked = [request(1, 0, sample[:1], [*sample[1:], *slow]), request(2, 3, [], sample[:9])]
    found = answer("r", [block(2), *asked, *sample, *slow])
    assert (found.steps.steps, found.steps.on_demand) == (10, 19)
    assert found.steps.saving_ms == pytest.approx(SLOW_MS * (1 - 1 / RANKS))
    assert found.steps.by_rank[2].ms[2] == pytest.approx(EXPERTS_MS + SLOW_MS / 10)
    first, other = found.requests
    assert (first.prefill_steps + first.decode_steps, first.on_demand, other.on_demand) == (29, 19, 0)
    assert first.waited_ms == pytest.approx(20 * SLOW_MS)
    assert all(check.ok for check in found.checks if "links" not in check.name), found.checks
    console = Console(width=200, record=True, file=io.StringIO())
    for part in answer_text(found):
        console.print(part)
    assert "19 more were traced for slow requests" in console.export_text()
    assert "19 more, traced for slow requests" in wide_ep.SCENARIO.html(found)


def test_the_terminal_and_the_report_show_it(found: WideEpAnswer) -> None:
    text = shown(found)
    assert "unknown" not in text
    request_id = found.requests[0].trace_id
    for words in ("10 steps of 4 ranks", "node-1", request_id, "fullest has 3.60 times", "caused: by tokens"):
        assert words in text
    html = wide_ep.SCENARIO.html(found)
    assert "Mean ms per step, by rank and phase" in html
    assert "Tokens that each rank sent to each expert" in html
    assert "caused, by tokens" in html
    assert found.requests[0].trace_id in html
    assert "<script src" not in html


def test_the_pods_of_ranks_are_told_where_they_have_any(found: WideEpAnswer) -> None:
    assert {share.pod for share in found.steps.by_rank} == {""}
    assert "pod" not in shown(found)
    pods = {0: "decode-0", 1: "decode-0-1"}
    slow = {2: EXPERTS_MS + SLOW_MS}
    before = step(0, RANKS, ranks_per_node=2, experts_ms=slow, pods={0: "decode-0", 1: "gone"})
    found = answer("r", [block(0), before, step(1, RANKS, ranks_per_node=2, experts_ms=slow, pods=pods)])
    assert [share.pod for share in found.steps.by_rank] == ["decode-0", "decode-0", "decode-0-1", "decode-0-1"]
    assert [share.pod for share in found.steps.by_node] == ["", ""]
    assert [straggler.pod for straggler in found.steps.stragglers] == ["decode-0-1"]
    assert found.verdict.startswith("Rank 2 on node-1 (decode-0-1) comes last")
    assert shown(found).count("decode-0-1") == 3
    assert wide_ep.SCENARIO.html(found).count("<td>decode-0-1") == 3


def test_steps_of_replayed_graphs_alone() -> None:
    made = [step(n, RANKS, tokens=[9, 1, 0, 0], late_ms={2: SLOW_MS * (n != 4)}, phased=False) for n in range(5)]
    found = answer("r", [block(1), request(1, 0, made[:1], made[1:]), *made])
    steps = found.steps
    assert (steps.steps, steps.unknown, steps.partial) == (5, 5, 0)
    assert steps.unknown_ms == steps.lasted_ms
    assert steps.experts is not None
    assert steps.by_rank[0].ms == pytest.approx([0.0] * 6 + [steps.by_rank[0].step_ms])
    assert steps.by_rank[0].waited_ms == pytest.approx(SLOW_MS * 4 / 5)
    assert "Rank 2 on node-0 comes last in 80% of the steps that do not say their phases" in found.verdict
    assert "20.0 ms for it; it begins late" in found.verdict
    assert "even load" not in found.verdict
    (asked,) = found.requests
    assert (asked.waited_ms, asked.caused_ms) == (pytest.approx(4 * SLOW_MS), 0.0)
    assert sum(asked.ms) == pytest.approx(asked.step_ms) == asked.ms[-1]
    assert all(check.ok for check in found.checks), found.checks
    assert WideEpAnswer.model_validate_json(found.model_dump_json()) == found  # no NaN
    assert "5 of them do not say their phases" in shown(found)
    assert "unknown" in shown(found)
    assert "5 of 5 steps do not say their phases" in wide_ep.SCENARIO.html(found)


def test_graphs_without_a_late_rank_and_graphs_beside_eager_steps() -> None:
    graphs = [step(n, RANKS, phased=False) for n in range(2, 4)]
    found = answer("r", [block(0), *graphs])
    assert found.verdict == (
        "No step says its phases, and no rank begins late: who is slow within a step is not known. "
        "Waiting takes 0% of the steps' time."
    )
    eager = [step(n, RANKS, experts_ms={2: EXPERTS_MS + SLOW_MS}) for n in range(2)]
    found = answer("r", [block(0), *eager, *graphs])
    assert "Rank 2 on node-0 comes last in 100% of the steps that say their phases" in found.verdict
    assert found.verdict.endswith("would have saved 47% of those that say their phases.")
    assert found.steps.unknown_ms == pytest.approx(found.steps.lasted_ms / 2 - SLOW_MS)


def shown(found: WideEpAnswer) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in answer_text(found):
        console.print(part)
    return console.export_text()


def test_no_tokens_of_experts_and_one_rank() -> None:
    found = answer("r", [block(0), *steps(3, 1)])
    assert found.verdict == "One rank steps alone: nobody waits."
    assert found.steps.experts is None
    assert wide_ep.SCENARIO.html(found)


def test_the_workload_is_the_same_for_a_seed_and_needs_no_long_context() -> None:
    workload = WideEpWorkload()
    sent = [chat.requests[0] for n in range(workload.blocks) for chat in workload.chats(n)]
    assert len(sent) == workload.size == 24
    assert sent == [chat.requests[0] for n in range(workload.blocks) for chat in WideEpWorkload().chats(n)]
    assert max(len(r.messages[0]["content"]) for r in sent) < 500
    assert len({r.messages[0]["content"] for r in sent}) == len(sent)


def test_requests_without_steps_are_left_out() -> None:
    made = [step(0, RANKS)]
    served = Served("0" * 32, "balanced", 0, "1", "t", "c", 0, 0, False, None, None, None, None, None, None)
    assert request_steps(read_steps(made), [served], made) == []
