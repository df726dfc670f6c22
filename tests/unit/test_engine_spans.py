from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.engine import clock
from llmtrace.engine.facts import Facts, Load, Preemption, from_wire, is_sampled, to_wire
from llmtrace.engine.spans import Phase, Window, phases
from llmtrace.semconv import attributes as names

OFFSET = 1_700_000_000 * clock.NS_PER_S
MS = 1_000_000


def facts(**changes: object) -> Facts:
    base = Facts(
        queued=10.0,
        arrival_ns=OFFSET + 10 * clock.NS_PER_S - 5 * MS,
        scheduled=10.1,
        first_token=10.4,
        last_token=11.0,
        finished=11.001,
        offset_ns=OFFSET,
        finish_reason="stop",
        engine_id="engine-a",
        dp_rank=2,
        position=3,
        running=4,
        waiting=1,
        kv_usage=0.25,
        prompt_tokens=300,
        computed_tokens=172,
        local_cached_tokens=128,
        external_cached_tokens=0,
        chunks=[(10.1, 100, 3, 412), (10.2, 72, 3, 40)],
        chunk_count=2,
        output_tokens=7,
        worst_gap=0.2,
        kv_blocks=3,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def ms(phase: Phase) -> tuple[str, float, float]:
    """Name, start and length in ms after the request was queued."""
    start = (phase.start_ns - OFFSET) / MS - 10_000
    return phase.name, round(start, 3), round((phase.end_ns - phase.start_ns) / MS, 3)


def test_plain_request() -> None:
    found = phases(facts(), "cmpl-1")
    assert [ms(phase) for phase in found] == [("queue", 0, 100), ("prefill", 100, 300), ("decode", 400, 600)]
    queue, prefill, decode = found
    common = {names.REQUEST_ID: "cmpl-1", names.ENGINE_ID: "engine-a", names.DP_RANK: 2}
    assert queue.attributes == common | {
        names.QUEUE_REASON: "admission",
        names.QUEUE_POSITION: 3,
        names.QUEUE_RUNNING: 4,
        names.QUEUE_WAITING: 1,
        names.KV_CACHE_USAGE: 0.25,
    }
    assert prefill.attributes == common | {
        names.INPUT_TOKENS: 300,
        names.COMPUTED_TOKENS: 172,
        names.LOCAL_CACHED_TOKENS: 128,
        names.EXTERNAL_CACHED_TOKENS: 0,
        names.CACHED_TOKENS: 128,
        names.PREFILL_CHUNKS: 2,
    }
    assert decode.attributes == common | {
        names.OUTPUT_TOKENS: 7,
        names.TPOT_MEAN: pytest.approx(100),
        names.TOKEN_GAP_MAX: pytest.approx(200),
        names.FINISH_REASONS: ("stop",),
        names.KV_CACHE_BLOCKS: 3,
    }
    assert [event.name for event in prefill.events] == [names.CHUNK_EVENT, names.CHUNK_EVENT, names.FIRST_TOKEN]
    assert prefill.events[0].attributes == {
        names.CHUNK_TOKENS: 100,
        names.CHUNK_BATCH_REQUESTS: 3,
        names.CHUNK_BATCH_TOKENS: 412,
    }


def test_waiting_for_remote_kv_is_not_queueing() -> None:
    load = Load(10.02, 10.06, 256, blocks=8, size=131072, transfer=0.0131)
    found = phases(facts(loads=[load], remote_engine_id="prefiller"), "r")
    assert [ms(phase) for phase in found[:4]] == [
        ("queue", 0, 20),
        ("kv_load", 20, 40),
        ("queue", 60, 40),
        ("prefill", 100, 300),
    ]
    assert found[0].attributes[names.QUEUE_REASON] == "admission"
    assert names.KV_CACHE_USAGE not in found[0].attributes
    assert found[2].attributes[names.QUEUE_REASON] == "kv_loaded"
    assert found[2].attributes[names.KV_CACHE_USAGE] == 0.25
    assert found[1].attributes[names.KV_LOAD_TOKENS] == 256
    assert found[1].attributes[names.KV_LOAD_REMOTE_ENGINE] == "prefiller"
    assert found[1].attributes[names.KV_LOAD_FAILED] is False
    assert found[1].attributes[names.KV_LOAD_BLOCKS] == 8
    assert found[1].attributes[names.KV_LOAD_BYTES] == 131072
    assert found[1].attributes[names.KV_LOAD_TRANSFER_TIME] == pytest.approx(13.1)


def test_what_is_not_known_of_a_load_is_left_out() -> None:
    load = phases(facts(loads=[Load(10.02, 10.06, 256)]), "r")[1]
    assert {name for name in load.attributes if "kv_load" in name} == {names.KV_LOAD_TOKENS, names.KV_LOAD_FAILED}


def test_load_that_never_ended() -> None:
    aborted = facts(scheduled=None, first_token=None, last_token=None, finish_reason="abort", loads=[Load(10.5)])
    found = phases(aborted, "r")
    assert [ms(phase) for phase in found] == [("queue", 0, 500), ("kv_load", 500, 501)]
    assert [event.name for event in found[-1].events] == [names.ABORT_EVENT]
    assert found[-1].attributes[names.FINISH_REASONS] == ("abort",)


def test_one_token_has_no_decode() -> None:
    found = phases(facts(output_tokens=1, last_token=10.4), "r")
    assert [phase.name for phase in found] == ["queue", "prefill"]
    assert found[-1].attributes[names.FINISH_REASONS] == ("stop",)


def test_aborted_in_the_queue() -> None:
    found = phases(facts(scheduled=None, first_token=None, last_token=None, finish_reason="abort", chunks=[]), "r")
    assert [ms(phase) for phase in found] == [("queue", 0, 1001)]
    assert [event.name for event in found[0].events] == [names.ABORT_EVENT]


def test_aborted_while_decoding_lasts_until_the_abort() -> None:
    found = phases(facts(finish_reason="abort", finished=11.5), "r")
    assert ms(found[-1]) == ("decode", 400, 1100)
    assert not found[-1].failed


def test_failed_request() -> None:
    found = phases(facts(finish_reason="error", first_token=None, last_token=None, output_tokens=0), "r")
    assert [phase.name for phase in found] == ["queue", "prefill"]
    assert [phase.failed for phase in found] == [False, True]


def test_preemption_shows_where_it_happened() -> None:
    found = phases(facts(preemptions=[Preemption(10.5, 10.7), Preemption(10.9)], finish_reason="abort"), "r")
    decode = found[-1]
    assert [event.name for event in decode.events] == ["preempted", "resumed", "preempted", "abort"]
    assert decode.attributes[names.PREEMPTIONS] == 2
    assert decode.attributes[names.PREEMPTED_TIME] == pytest.approx(200 + 101)


def test_speculation() -> None:
    decode = phases(facts(draft_tokens=20, accepted_tokens=5), "r")[-1]
    assert decode.attributes[names.ACCEPTANCE_RATE] == 0.25


moment = st.none() | st.floats(0, 100)
count = st.none() | st.integers(0, 2**40)


@st.composite
def any_facts(draw: st.DrawFn) -> Facts:
    """What could come, in any order and with holes."""
    loads = [
        Load(start, end, 1, failed, blocks, size, transfer)
        for start, end, failed, blocks, size, transfer in draw(
            st.lists(st.tuples(st.floats(0, 100), moment, st.booleans(), count, count, moment), max_size=3)
        )
    ]
    return facts(
        queued=draw(st.floats(0, 100)),
        scheduled=draw(moment),
        first_token=draw(moment),
        last_token=draw(moment),
        finished=draw(st.floats(0, 100)),
        loads=loads,
        output_tokens=draw(st.integers(0, 5)),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort", "error"])),
        preemptions=[
            Preemption(start, end) for start, end in draw(st.lists(st.tuples(st.floats(0, 100), moment), max_size=2))
        ],
    )


@given(any_facts(), st.none() | st.tuples(st.integers(0, 50), st.integers(50, 100)))
def test_spans_tile_the_request(request: Facts, seconds: tuple[int, int] | None) -> None:
    window = seconds and Window(OFFSET + seconds[0] * clock.NS_PER_S, OFFSET + seconds[1] * clock.NS_PER_S)
    found = phases(request, "r", window)
    assert found[0].name == "queue"
    for phase in found:
        assert phase.start_ns <= phase.end_ns
        if window:
            assert window.start_ns <= phase.start_ns
            assert phase.end_ns <= window.end_ns
    for before, after in itertools.pairwise(found):
        assert before.end_ns == after.start_ns
    for phase in found:
        for event in phase.events:
            assert window is None or window.start_ns <= event.time_ns <= window.end_ns
    assert {phase.name for phase in found} <= {"queue", "kv_load", "prefill", "decode"}
    assert [phase.name for phase in found].count("prefill") <= 1
    assert [phase.name for phase in found].count("decode") <= 1


@given(any_facts())
def test_wire(request: Facts) -> None:
    assert from_wire(to_wire(request)) == request


def test_other_versions_are_left_alone() -> None:
    values = json.loads(to_wire(facts()))
    assert from_wire(json.dumps([99, *values[1:]])) is None
    assert from_wire(json.dumps(values[:-1])) is None


def test_wire_holds_no_tokens() -> None:
    assert {field.name for field in dataclasses.fields(Facts)}.isdisjoint({"token_ids", "prompt", "text"})


@pytest.mark.parametrize(
    ("headers", "sampled"),
    [
        (None, False),
        ({}, False),
        ({"tracestate": "a=b"}, False),
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, True),
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03"}, True),
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}, False),
        ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz"}, False),
        ({"traceparent": "garbage"}, False),
    ],
)
def test_sampled(headers: dict[str, str] | None, sampled: bool) -> None:
    assert is_sampled(headers) is sampled


def test_clock_converts_with_one_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.wall_ns(1.5, 10) == 1_500_000_010
    assert abs(clock.offset_ns() - clock.offset_ns()) < 5 * MS
    monotonic = iter([0, 100, 200, 204, 300, 400])
    wall = iter([1050, 1302, 1450])
    monkeypatch.setattr(clock, "monotonic_ns", lambda: next(monotonic))
    monkeypatch.setattr(clock, "time_ns", lambda: next(wall))
    assert clock.offset_ns() == 1302 - 202, "the tightest of three readings"
