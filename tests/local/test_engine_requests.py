"""The plugin's spans of some 270 requests of all kinds, against vLLM's own numbers of the same requests.

The server has little KV cache, few places in its batch and small steps, so that requests wait, are prefilled in chunks
and are preempted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from engine_servers import ModelServer, serving
from engine_trees import Tree, settle, trees
from engine_workload import Answered, Planned, answer, chat, client, completion, mixed, refused, send, unsampled
from loopback import Receiver, sample_sum, until

from llmtrace.semconv import attributes as names

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]

CONTEXT = 1024
BATCH = 6
AT_ONCE = 20
LONG = 940
"""Tokens of a request that takes long."""
ARGUMENTS = (
    *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(BATCH), "--max-num-batched-tokens", "128"),
    # 1,280 tokens: two or three long requests fill it.
    *("--num-gpu-blocks-override", "40"),
)
SPAN_MS = 0.001
"""A span's length may differ from vLLM's time by this: the rounding of seconds to nanoseconds."""
SUM_S = 0.0001
"""The same for the sum over all requests, against the sum of a histogram."""
CLOCK_NS = 2_000_000
"""Two readings of the wall clock may differ by this: one of them is converted from the monotonic clock."""
LATE_TOKENS = 64
"""The engine makes at most so many tokens between a client's hanging up and its learning of it, by the API server."""


@pytest.fixture(scope="module")
def server(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    server = ModelServer(tmp_path_factory.mktemp("vllm"), receiver, *ARGUMENTS)
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def counted(server: ModelServer, receiver: Receiver) -> tuple[list[Answered], str, str]:
    """Requests that all end by themselves, and the server's metrics before and after them."""
    before = server.metrics()
    answered = asyncio.run(send(server, mixed(200, seed=7), AT_ONCE))
    after = server.metrics()
    settle(server, receiver)
    return answered, before, after


def trees_of(receiver: Receiver, planned: Planned) -> list[Tree]:
    """The trees of a request that was sent; fails unless there is exactly one for each request of the engine."""
    found = trees(receiver.trace(planned.trace_id))
    assert len(found) == planned.engine_requests, planned.kind
    return found


def all_trees(receiver: Receiver, answered: list[Answered]) -> list[Tree]:
    return [tree for item in answered for tree in trees_of(receiver, item.planned)]


def test_each_request_once_and_whole(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    kinds = Counter(item.planned.kind for item in counted[0])
    assert len(kinds) == 13
    assert min(kinds.values()) >= 10
    for item in counted[0]:
        for tree in trees_of(receiver, item.planned):
            assert tree.order[-1] == ("prefill" if tree.vllm(names.VLLM_COMPLETION_TOKENS) == 1 else "decode")
            assert tree.reason in ("length", "stop")
            assert tree.events(names.ABORT_EVENT) == []


def test_times_are_vllms(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    for item in counted[0]:
        for tree in trees_of(receiver, item.planned):
            queue, prefill, decode = (
                1000 * tree.vllm(f"gen_ai.latency.time_in_{name}")
                for name in ("queue", "model_prefill", "model_decode")
            )
            assert tree.ms("queue") == pytest.approx(queue, abs=SPAN_MS)
            assert tree.ms("prefill") == pytest.approx(prefill, abs=SPAN_MS)
            if item.planned.kind == "stop string":
                # The engine goes on until it hears that the API server has found the string.
                assert tree.ms("decode") >= decode - SPAN_MS
            else:
                assert tree.ms("decode") == pytest.approx(decode, abs=SPAN_MS)


def test_tokens_are_vllms(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    for item in counted[0]:
        found = trees_of(receiver, item.planned)
        for tree in found:
            made = tree.number(names.OUTPUT_TOKENS) or 1
            more = made - tree.vllm(names.VLLM_COMPLETION_TOKENS)
            assert more >= 0 if item.planned.kind == "stop string" else more == 0
            assert tree.number(names.INPUT_TOKENS) == tree.vllm(names.VLLM_PROMPT_TOKENS)
            cached = tree.number(names.LOCAL_CACHED_TOKENS)
            assert tree.number(names.CACHED_TOKENS) == cached == tree.request.attributes[names.CACHED_TOKENS]
            assert tree.number(names.COMPUTED_TOKENS) + cached == tree.number(names.INPUT_TOKENS)
        assert item.usage is not None
        if len(found) == 1:
            assert item.usage["prompt_tokens_details"]["cached_tokens"] == found[0].number(names.CACHED_TOKENS)
        assert item.usage["completion_tokens"] == sum(tree.vllm(names.VLLM_COMPLETION_TOKENS) for tree in found)


def test_prefill_chunks(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    chunked = 0
    for tree in all_trees(receiver, counted[0]):
        if tree.number(names.PREEMPTIONS):
            continue
        chunks = [event.attributes[names.CHUNK_TOKENS] for event in tree.events(names.CHUNK_EVENT)]
        assert len(chunks) == tree.number(names.PREFILL_CHUNKS)
        assert sum(chunks) == tree.number(names.COMPUTED_TOKENS)
        chunked += len(chunks) > 1
    assert chunked >= 20


def test_sums_are_those_of_the_metrics(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    answered, before, after = counted

    def grown(name: str, **labels: str) -> float:
        return sample_sum(after, f"vllm:{name}", **labels) - sample_sum(before, f"vllm:{name}", **labels)

    found = all_trees(receiver, answered)
    stopped = [
        tree for item in answered if item.planned.kind == "stop string" for tree in trees_of(receiver, item.planned)
    ]
    late_s = sum(tree.ms("decode") / 1000 - tree.vllm("gen_ai.latency.time_in_model_decode") for tree in stopped)
    for phase in ("queue", "prefill", "decode"):
        assert grown(f"request_{phase}_time_seconds_count") == len(found)
        ours = sum(tree.ms(phase) for tree in found) / 1000 - (late_s if phase == "decode" else 0)
        assert ours == pytest.approx(grown(f"request_{phase}_time_seconds_sum"), abs=SUM_S)
    assert sum(tree.number(names.INPUT_TOKENS) for tree in found) == grown("prompt_tokens_total")
    assert sum(tree.vllm(names.VLLM_COMPLETION_TOKENS) for tree in found) == grown("generation_tokens_total")
    assert sum(tree.number(names.INPUT_TOKENS) for tree in found) == grown("prefix_cache_queries_total")
    assert sum(tree.number(names.LOCAL_CACHED_TOKENS) for tree in found) == grown("prefix_cache_hits_total") > 0
    for reason, count in Counter(tree.reason for tree in found).items():
        assert grown("request_success_total", finished_reason=reason) == count
    assert sum(tree.number(names.PREEMPTIONS) for tree in found) == grown("num_preemptions_total")


def test_times_between_tokens_are_vllms(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    answered, before, after = counted
    expected = 0.0
    for item in answered:
        for tree in trees_of(receiver, item.planned):
            made = tree.vllm(names.VLLM_COMPLETION_TOKENS)
            if item.planned.kind == "stop string":
                # Here the engine knows more tokens than the API server, whose mean this is.
                expected += tree.vllm("gen_ai.latency.time_in_model_decode") / (made - 1) if made > 1 else 0
            elif made > 1:
                expected += tree.number(names.TPOT_MEAN) / 1000
                assert tree.number(names.TPOT_MEAN) - SPAN_MS <= tree.number(names.TOKEN_GAP_MAX)
                assert tree.number(names.TOKEN_GAP_MAX) <= tree.ms("decode") + SPAN_MS
    name = "vllm:request_time_per_output_token_seconds_sum"
    assert sample_sum(after, name) - sample_sum(before, name) == pytest.approx(expected, abs=SUM_S)


def test_phases_lie_between_what_the_client_saw(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    """By the clock of the wall, which is the client's too."""
    for item in counted[0]:
        found = trees_of(receiver, item.planned)
        for tree in found:
            assert item.sent_ns - CLOCK_NS <= tree.request.start_ns
            assert tree.phases[-1].start_ns <= item.answered_ns + CLOCK_NS
        prefilled = [span.end_ns for tree in found for span in tree.phases if span.name == "prefill"]
        assert item.sent_ns < min(prefilled) <= item.first_ns + CLOCK_NS, item.planned.kind


def test_structured_output_is_said(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    said = {
        structured: {
            tree.said(names.STRUCTURED_OUTPUT)
            for item in counted[0]
            if item.planned.kind.startswith("structured") is structured
            for tree in trees_of(receiver, item.planned)
        }
        for structured in (True, False)
    }
    assert said == {True: {True}, False: {None}}


def test_preemptions_happened(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    preempted = [tree for tree in all_trees(receiver, counted[0]) if tree.number(names.PREEMPTIONS)]
    assert preempted
    for tree in preempted:
        times = tree.number(names.PREEMPTIONS)
        assert len(tree.events(names.PREEMPTED_EVENT)) == len(tree.events(names.RESUMED_EVENT)) == times
        assert 0 < tree.number(names.PREEMPTED_TIME) <= tree.ms("prefill", "decode")


def test_queueing_happened(counted: tuple[list[Answered], str, str], receiver: Receiver) -> None:
    found = all_trees(receiver, counted[0])
    assert max(tree.ms("queue") for tree in found) > 100
    assert max(tree.number(names.QUEUE_POSITION) for tree in found) >= AT_ONCE - BATCH
    assert max(tree.number(names.QUEUE_RUNNING) for tree in found) == BATCH


def check_aborted(tree: Tree) -> None:
    assert tree.reason == "abort"
    assert len(tree.events(names.ABORT_EVENT)) == 1
    assert tree.said(names.FINISH_REASONS) == ["abort"]
    assert tree.request.parent_id == "00000000000000aa"


def abandoned(receiver: Receiver, requests: list[Planned]) -> list[Tree]:
    """The trees of those among ``requests`` that ended because the client hung up.

    On a busy machine vLLM may make all their tokens before it learns of it; those are whole, and do not count here.
    """
    found = []
    for request in requests:
        for tree in trees_of(receiver, request):
            if tree.reason == "abort":
                check_aborted(tree)
                found.append(tree)
            else:
                assert (tree.reason, tree.number(names.OUTPUT_TOKENS)) == ("length", request.body["max_tokens"])
    return found


def wait_for(receiver: Receiver, requests: list[Planned]) -> None:
    for request in requests:
        until(
            lambda request=request: (
                len(receiver.trace(request.trace_id).named(names.SERVER_SPAN)) == request.engine_requests
            ),
            "the spans of a request that was given up",
        )


async def hang_up_in_the_queue(server: ModelServer, long: list[Planned], given_up: list[Planned]) -> None:
    """Fill the batch with ``long``, queue ``given_up`` behind them, let those hang up, and see the others through."""
    async with client(server) as connection:
        running = [asyncio.create_task(answer(connection, request)) for request in long]
        waiting = [asyncio.create_task(answer(connection, request)) for request in given_up]
        while sample_sum(await asyncio.to_thread(server.metrics), "vllm:num_requests_waiting") < len(given_up):
            assert not all(task.done() for task in running), "the queue never grew"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*running)


def test_clients_that_hang_up_in_the_queue(server: ModelServer, receiver: Receiver) -> None:
    long = [completion("long", f"{number} " + "y" * 90, 500) for number in range(BATCH)]
    given_up = [
        completion("given up", f"{number} " + "z" * 300, LONG // 2, n=1 + number % 2, stream=number > 6)
        for number in range(12)
    ]
    asyncio.run(hang_up_in_the_queue(server, long, given_up))
    settle(server, receiver)
    for request in long:
        assert [tree.reason for tree in trees_of(receiver, request)] == ["length"]
    # One that had not come as far as the engine has no trace.
    found = abandoned(receiver, [request for request in given_up if receiver.of(request.trace_id)])
    assert len([tree for tree in found if tree.order == ["queue"]]) >= len(given_up) - BATCH


def hanging_up(number: int) -> Planned:
    return completion(
        "given up", f"{number} " + "z" * 60, LONG, stream=True, hang_up_after=3 + number, n=1 + number % 2
    )


def test_clients_that_hang_up_in_the_middle(server: ModelServer, receiver: Receiver) -> None:
    given_up, others = [hanging_up(number) for number in range(9)], mixed(13, seed=8)
    before = server.value("vllm:generation_tokens_total")
    asyncio.run(send(server, [*given_up, *others], AT_ONCE))
    wait_for(receiver, given_up)
    settle(server, receiver)
    # How many depends on how soon the server notices.
    found = abandoned(receiver, given_up)
    assert any(tree.order[-1] == "decode" for tree in found)
    # vLLM counts the tokens that its API server took in; the spans, those that the engine made.
    made = sum(tokens(tree) for request in (*given_up, *others) for tree in trees_of(receiver, request))
    counted = server.value("vllm:generation_tokens_total") - before - 1  # settle's
    late = len(found) + sum(request.kind == "stop string" for request in others)
    assert 0 <= made - counted <= LATE_TOKENS * late


def tokens(tree: Tree) -> float:
    return tree.number(names.OUTPUT_TOKENS) or len(tree.events(names.FIRST_TOKEN))


def test_client_that_hangs_up_alone(server: ModelServer, receiver: Receiver) -> None:
    """No other request's step carries the news."""
    given_up = [hanging_up(number) for number in range(0, 8, 2)]
    for request in given_up:
        asyncio.run(send(server, [request], 1))
        wait_for(receiver, [request])
        settle(server, receiver)
        if abandoned(receiver, [request]):
            return
    pytest.fail("vLLM made all tokens of four requests before it learned that their clients had hung up")


def test_nothing_of_requests_that_are_not_sampled_or_refused(server: ModelServer, receiver: Receiver) -> None:
    silent = [*unsampled(24), *refused(CONTEXT)]
    seen = mixed(13, seed=9)
    asyncio.run(send(server, [*silent, *seen], AT_ONCE))
    settle(server, receiver)
    for request in silent:
        assert receiver.of(request.trace_id) == [], request.kind
    for request in seen:
        trees_of(receiver, request)


def test_requests_without_a_context_have_vllms_span_only(server: ModelServer, receiver: Receiver) -> None:
    """VLLM begins a trace for each of them; the plugin adds nothing to it."""
    asyncio.run(send(server, [chat("no context", "x", 4, sampled=None)], 1))
    settle(server, receiver)
    traces = [receiver.trace(trace_id) for trace_id in receiver.trace_ids()]
    begun = [trace for trace in traces if names.SERVER_SPAN in {root.name for root in trace.roots}]
    assert begun
    for trace in begun:
        assert [span.name for span in trace.spans] == [names.SERVER_SPAN]
        assert names.FINISH_REASONS not in trace.spans[0].attributes


def test_the_log_is_quiet(counted: tuple[list[Answered], str, str], server: ModelServer) -> None:
    assert "llmtrace: " not in server.text()
