"""The arithmetic of bench.overhead, and what it reads and writes. How fast anything is, no test says."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.overhead import analysis, inside, load, report
from bench.overhead.analysis import Losses, Percentiles
from bench.overhead.engine_loop import Costs
from bench.overhead.live import Live
from bench.overhead.load import Load, Stream, Times
from bench.overhead.plans import BASE, BUILT_IN_FULL, DOWN, FULL, LADDER, OUT, PLUGIN, PRESSED, TINY, Cell
from bench.overhead.rounds import Measured, Sample, Usage
from bench.overhead.servers import Cpu, Memory
from bench.sink import SERVICE, Counts, sink
from llmtrace.engine import compat, hooks
from llmtrace.errors import UserError
from llmtrace.stats import Interval

ROOT = Path(__file__).parents[2]
HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Tue, 01 Sep 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
TOKENS = 5


def event(data: str) -> bytes:
    text = f"data: {data}\n\n".encode()
    return f"{len(text):x}\r\n".encode() + text + b"\r\n"


def answer() -> list[bytes]:
    """What vLLM sends for a completion of five tokens with stream_options.include_usage, event by event."""
    tokens = [event(json.dumps({"choices": [{"index": 0, "text": f"\n{i}", "finish_reason": None}]})) for i in range(5)]
    usage = {"prompt_tokens": 9, "total_tokens": 14, "completion_tokens": TOKENS}
    return [HEAD, *tokens, event(json.dumps({"choices": [], "usage": usage})), event("[DONE]"), b"0\r\n\r\n"]


def test_a_stream_gives_the_times_of_its_tokens() -> None:
    stream = Stream(sent=10.0)
    head, *tokens, usage, done, end = answer()
    found = [stream.receive(head, 10.5)]
    found += [stream.receive(token, 11.0 + i * 0.25) for i, token in enumerate(tokens)]
    found += [stream.receive(usage, 20.0), stream.receive(done, 21.0)]
    assert found == [None] * 8
    assert stream.receive(end, 22.0) == Times(1.0, 2.0, 0.25, (0.25,) * 4, TOKENS)


def test_tokens_that_come_together_count_as_one_arrival() -> None:
    stream = Stream(sent=0.0)
    head, first, *others, usage, done, end = answer()
    stream.receive(head + first, 1.0)
    stream.receive(b"".join(others), 3.0)
    assert stream.receive(usage + done + end, 9.0) == Times(1.0, 3.0, 0.5, (2.0,), TOKENS)


@given(st.lists(st.integers(min_value=1, max_value=len(b"".join(answer())) - 1), max_size=40))
def test_a_stream_is_read_the_same_however_it_is_cut(cuts: list[int]) -> None:
    whole = b"".join(answer())
    borders = sorted({0, *cuts, len(whole)})
    pieces = [whole[low:high] for low, high in itertools.pairwise(borders)]
    stream = Stream(sent=0.0)
    results = [stream.receive(piece, float(number)) for number, piece in enumerate(pieces)]
    assert results[:-1] == [None] * (len(pieces) - 1)
    times = results[-1]
    assert times is not None
    first_ends, last_ends = (whole.index(b"\n\n", whole.index(f'\\n{i}"'.encode())) + 2 for i in (0, TOKENS - 1))

    def arrival(position: int) -> float:
        return float(next(number for number, high in enumerate(borders[1:]) if high >= position))

    assert (times.ttft, times.latency, times.tokens) == (arrival(first_ends), arrival(last_ends), TOKENS)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
        HEAD + event('{"choices": []}') + event("[DONE]") + b"0\r\n\r\n",
    ],
    ids=["refused", "no usage"],
)
def test_an_answer_that_is_no_measurement_is_an_error(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        Stream(0.0).receive(data, 1.0)


def test_requests_are_the_same_for_a_seed_and_spread_around_the_means() -> None:
    found = load.requests(3, 400, 128, 64, 250)
    assert found == load.requests(3, 400, 128, 64, 250)
    assert found != load.requests(4, 400, 128, 64, 250)
    lengths = [each.max_tokens for each in found]
    assert (min(lengths), max(lengths)) == (32, 96)
    assert sum(lengths) / len(lengths) == pytest.approx(64, abs=4)
    assert all(0 <= token < 250 for each in found for token in each.prompt)


@pytest.mark.parametrize(("sampled", "flag"), [(True, "01"), (False, "00")])
def test_a_request_says_whether_it_is_sampled(sampled: bool, flag: str) -> None:
    message = load.encode(load.Request((1, 2), 7), salt="a", sampled=sampled, ids=random.Random(1))
    head, _, body = message.partition(b"\r\n\r\n")
    trace = next(line for line in head.decode().splitlines() if line.startswith("traceparent: "))
    assert [len(part) for part in trace.split(": ")[1].split("-")] == [2, 32, 16, 2]
    assert trace.endswith(flag)
    assert json.loads(body)["prompt"] == [1, 2]
    assert f"content-length: {len(body)}".encode() in head


def sample(cell: Cell, start: int, number: int, seconds: float, *, requests: int = 10, spans: int = 0) -> Sample:
    """Requests of 20 tokens each, one after the other."""
    each = seconds / requests
    times = [Times(each / 2, each, each / 40, (each / 40,) * 19, 20)] * requests
    return Sample(
        cell, start, number, Load(seconds, times), 0, Cpu(seconds / 4, seconds / 2), Counts(1, spans, spans * 500)
    )


def measured(slower: Callable[[int, int], float], starts: int = 2, rounds: int = 6) -> Measured:
    """``slower``: the factor of FULL against BASE by start and round. The machine drifts, the same for both."""
    found = Measured(replace(TINY, starts=starts, rounds=rounds, cells=(BASE, BUILT_IN_FULL, FULL)), [], [])
    for start in range(starts):
        for number in range(rounds):
            drift = 1 + 0.5 * number + start
            found.samples.append(sample(BASE, start, number, drift))
            found.samples.append(sample(FULL, start, number, drift * slower(start, number), spans=40))
    return found


def test_a_change_is_found_through_the_drift_of_the_machine() -> None:
    found = measured(lambda _start, _number: 1.25)
    for metric, percent in ((analysis.throughput, -20), (analysis.ttft, 25), (analysis.tpot, 25), (analysis.cpu, 25)):
        change = analysis.change(found, FULL, BASE, metric)
        assert (change.estimate, change.low, change.high) == pytest.approx((percent, percent, percent))


def test_opposite_changes_cancel() -> None:
    found = measured(lambda _start, number: 1.1 if number % 2 else 1 / 1.1)
    change = analysis.change(found, FULL, BASE, analysis.throughput)
    assert change.estimate == pytest.approx(0)
    assert change.low < -3 < 3 < change.high


def test_with_enough_starts_the_interval_is_that_of_the_starts() -> None:
    """Within a start all rounds agree, so rounds would promise far too much."""
    few = measured(lambda start, _number: 1.02 if start % 2 else 1 / 1.02, starts=analysis.STARTS - 2, rounds=40)
    many = measured(lambda start, _number: 1.02 if start % 2 else 1 / 1.02, starts=analysis.STARTS, rounds=40)
    rounds, starts = (analysis.change(each, FULL, BASE, analysis.throughput) for each in (few, many))
    assert rounds.high - rounds.low < 1
    assert starts.high - starts.low > 2


def test_a_summary_is_per_request() -> None:
    found = analysis.summary(measured(lambda _start, _number: 2.0, starts=1, rounds=1), FULL)
    assert found.requests == 10
    assert found.tokens_per_s == pytest.approx(100)
    assert (found.api_server_ms, found.engine_core_ms) == pytest.approx((50, 100))
    assert (found.spans, found.bytes) == (4, 2000)
    assert found.latency == Percentiles(*[pytest.approx(200)] * 3)
    assert found.gap.p99 == pytest.approx(5)


def test_spans_lost_are_what_a_healthy_server_would_have_sent() -> None:
    found = measured(lambda _start, _number: 1.0)
    for start in range(2):
        found.usages.append(Usage(PLUGIN, start, Memory(2 << 20, 1 << 20), 100, Counts(9, 400, 9), 0))
        found.usages.append(Usage(DOWN, start, Memory(2 << 20, 1 << 20), 50, Counts(1, 30, 9), 6))
    assert analysis.losses(found, DOWN) == Losses(400, 340, 6)
    assert analysis.losses(found, PLUGIN).lost == 0


COSTS = [Costs(n, 300, 2, 45, 4, 33, 13, 113, 190, 48, 60) for n in (1, 32, 256)]


def test_costs_are_set_against_a_step() -> None:
    assert COSTS[0].share(10) == pytest.approx(0.45)


def whole() -> analysis.Result:
    found = Measured(replace(TINY, starts=1, rounds=3), [], [])
    for cell in TINY.cells:
        found.samples.extend(sample(cell, 0, number, 1.0) for number in range(3))
    for variant in TINY.variants:
        found.usages.append(Usage(variant, 0, Memory(2 << 30, 1 << 30), 100, Counts(9, 400, 9), 0))
    return analysis.analyse(found)


def test_the_page_has_a_row_for_every_cell_and_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "overhead.md"
    page.write_text(f"# Before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results = [whole()]
    running = {"0%": Live(10, 9, 6, 2000), "100%": Live(20, 15, 6, 2000)}
    report.write_into(page, report.page(results, COSTS, running))
    text = page.read_text()
    assert text.startswith(f"# Before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "\nold\n" not in text
    for cell in (BUILT_IN_FULL, *LADDER):
        assert f"| {cell.name} " in text
    for cell in PRESSED:
        assert f"| {cell.variant.name} " in text
    assert "0.45 %" in text
    assert "1.00 %" in text
    report.write_into(page, "again")
    assert page.read_text() == f"# Before\n{report.BEGIN}\nagain\n{report.END}\nafter\n"
    data = report.data(results, COSTS, running)
    assert data["running_server"]["100%"]["step"] == 2000
    assert data["results"][0]["summaries"][FULL.name]["tokens_per_s"] == pytest.approx(200)
    assert data["results"][0]["against_none"][FULL.name]["throughput"]["estimate"] == 0


def test_a_page_without_markers_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(report.BEGIN)
    with pytest.raises(UserError, match="lacks the lines"):
        report.check(page)
    with pytest.raises(UserError, match="cannot be read"):
        report.check(tmp_path / "missing.md")


def test_the_project_s_page_has_its_markers() -> None:
    head, tail = report.check(ROOT / "docs/overhead.md")
    assert head.startswith("# ")
    assert tail


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(-0.9, 0.1, "within the goal"), (-3.0, -1.1, "beyond the goal"), (-1.5, 0.2, "does not decide")],
)
def test_the_verdict_is_the_interval_s(low: float, high: float, says: str) -> None:
    result = whole()
    changes = replace(
        result.against_none[FULL.name], throughput=Interval(estimate=(low + high) / 2, low=low, high=high)
    )
    against = {FULL.name: changes}
    assert says in report.verdict(replace(result, against_none=against, against_itself={}))
    assert says in report.verdict(replace(result, against_itself=against)).partition("same process")[2]


def test_a_server_is_compared_with_itself() -> None:
    found = measured(lambda _start, _number: 1.0)
    plan = replace(found.plan, cells=(*found.plan.cells, OUT))
    for each in found.samples[::2]:
        found.samples.append(sample(BUILT_IN_FULL, each.start, each.round, each.load.seconds))
        found.samples.append(sample(OUT, each.start, each.round, each.load.seconds / 1.25))
    found.usages.extend(Usage(variant, 0, Memory(1, 1), 1, Counts(), 0) for variant in plan.variants)
    slower = analysis.analyse(replace(found, plan=plan))
    assert set(slower.against_itself) == {FULL.name}
    assert slower.against_itself[FULL.name].throughput.estimate == pytest.approx(-20)
    assert slower.against_none[FULL.name].throughput.estimate == pytest.approx(0)


def test_the_switch_takes_hooks_out_and_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    owner = type("Owner", (), {"step": lambda self: "result"})
    module = types.ModuleType("a_module")
    module.Owner = owner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hook = replace(compat.HOOKS[0], module=module.__name__, owner="Owner", function="step")
    monkeypatch.setattr(compat, "HOOKS", (hook,))
    hooks.wrap(owner, "step", hooks.Guard(), before=lambda *_: calls.append(1))
    for move, expected in ((None, 1), (inside._out, 1), (inside._out, 1), (inside._in, 2)):
        if move is not None:
            move(0, None)
        assert owner().step() == "result"  # type: ignore[attr-defined]
        assert len(calls) == expected


def test_what_a_hook_adds_is_timed_without_vllms_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    now, samples = itertools.count(step=10), []
    monkeypatch.setattr(inside, "time", types.SimpleNamespace(perf_counter_ns=lambda: next(now)))
    clock = inside._Clock(samples)
    vllms = clock.inner(lambda: [next(now) for _ in range(5)])

    def hooked() -> None:
        next(now)
        vllms()

    clock.outer(hooked)()
    # From 0 to 90, of which vLLM's own took from 20 to 80.
    assert samples == [30]
    assert inside._summary([1000] * 99 + [10**9]) == {"calls": 100, "median": 1.0, "mean": 1.0}


def test_the_sink_counts_what_it_answers_and_nothing_else() -> None:
    message = ExportTraceServiceRequest()
    for names in (("a", "b"), ("c",)):
        scope = message.resource_spans.add().scope_spans.add()
        for name in names:
            scope.spans.add(name=name)
    data = message.SerializeToString()
    with sink([0.0, 60.0]) as [prompt, hangs]:
        for receiver, status in ((prompt, None), (hangs, grpc.StatusCode.DEADLINE_EXCEEDED)):
            with grpc.insecure_channel(f"127.0.0.1:{receiver.port}", [("grpc.enable_http_proxy", 0)]) as channel:
                grpc.channel_ready_future(channel).result(30)
                call = channel.unary_unary(f"/{SERVICE}/Export")
                if status is None:
                    call(data, timeout=30)
                    call(data, timeout=30)
                    continue
                with pytest.raises(grpc.RpcError) as refused:
                    call(data, timeout=0.5)
                assert refused.value.code() == status
        deadline = time.monotonic() + 30
        while prompt.counts().requests < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert prompt.counts() == Counts(2, 6, 2 * len(data))
        assert prompt.counts().since(Counts(1, 3, len(data))) == Counts(1, 3, len(data))
        assert hangs.counts() == Counts()
