"""Steps of real mixtures of experts: every rank's span, both ways of links, who is slow, which experts got what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from engine_servers import CHECKOUT, MODEL, ModelServer, in_trace, new_trace_id, serving, tiny_model
from loopback import Receiver, receiving, until

from bench.tiny_model_kinds import CHOICES, EVEN, ODD
from llmtrace.engine.steps.demand import WINDOW
from llmtrace.scenarios.wide_ep.experts import expert_load
from llmtrace.scenarios.wide_ep.steps import COLLECTIVES, Integers, Steps, read_steps
from llmtrace.scenarios.wide_ep.verify import step_faults
from llmtrace.scenarios.wide_ep.waiting import stragglers
from llmtrace.semconv import attributes as a
from llmtrace.semconv.conformance import check
from llmtrace.traces.model import Span, Trace

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]

RANKS = 2
LAYERS = 2
REQUESTS, TOKENS = 8, 12
SHIM = CHECKOUT / "playbooks/roles/servers/files"
EXTENSIONS = Path(__file__).with_name("vllm_extensions")
DELAY_MS = 15.0
"""In each layer."""
SLOW_MS = 500
HALT_MS = 400.0
"""In each layer: a step of it is slow."""
LONG = 900
"""Tokens, which take some seconds."""
NEVER = 1_000_000
"""One in so many: none of the sample."""
SETTLE_S = 20.0
QUIET_S = 1.0
"""Without a further step: nothing runs any more."""


class Server(ModelServer):
    """A mixture of experts on ``ranks``, each step traced, or one in ``every``, with the extension that tells which
    experts vLLM chose.
    """

    def __init__(
        self,
        folder: Path,
        receiver: Receiver,
        *arguments: str,
        kind: str,
        engines: int,
        every: int = 1,
        ranks: int = RANKS,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.receiver = receiver
        super().__init__(
            folder,
            receiver,
            *("--enable-expert-parallel", "--max-model-len", "1024"),
            *("--worker-extension-cls", "watched_ranks.WatchedRanks", *arguments),
            engines=engines,
            path=(SHIM, EXTENSIONS),
            environment={
                "LLMTRACE_STEP_EVERY": str(every),
                "LLMTRACE_STEP_SLOW_MS": str(SLOW_MS),
                "LLMTRACE_EXPERTS_EVERY": "1",
                "WATCHED_RANKS_FOLDER": str(folder),
            },
            model=tiny_model(kind),
        )

    def step_traces(self, after: int = 0) -> list[Trace]:
        """The traces of the steps with a number above ``after``, in order."""
        found = (self.receiver.trace(trace_id) for trace_id in self.receiver.trace_ids())
        steps = [trace for trace in found if trace.spans and trace.spans[0].name == a.STEP_SPAN]
        return sorted((t for t in steps if number(t) > after), key=number)

    def settled(self, after: int) -> list[Trace]:
        """The same, once all of them are whole and no more of them come."""

        def whole() -> list[Trace] | None:
            found = self.step_traces(after)
            ends = [number(t) for t in found]
            gaps = ends != list(range(after + 1, after + 1 + len(ends)))
            return None if not found or gaps or any(len(t.spans) < self.ranks for t in found) else found

        last: list[Trace] = []
        while True:
            found: list[Trace] = until(whole, "the spans of every rank in every step", SETTLE_S, poll_s=0.5)
            if len(found) == len(last):
                return found
            last = found
            time.sleep(QUIET_S)

    @contextmanager
    def slowed(self, rank: int, delay_ms: float) -> Iterator[None]:
        """Make each MoE layer of a rank take longer."""
        slow, made = self.folder / "slow", self.folder / "slow.made"
        made.write_text(f"{rank} {delay_ms}")
        made.rename(slow)  # in one piece: the rank may be looking
        try:
            yield
        finally:
            slow.unlink()

    def window(self) -> list[Trace] | None:
        """All traces of steps, in order, once they are a window's and each has every rank's span."""
        found = self.step_traces()
        return found if len(found) >= WINDOW and all(len(trace.spans) == self.ranks for trace in found) else None

    def ask(self, name: str) -> list[str]:
        """Requests at once, each in a trace of its own."""
        ids = [new_trace_id() for _ in range(REQUESTS)]

        def one(n: int) -> None:
            prompt = f"{name} {n} " * (4 + n)
            self.complete(ids[n], prompt=prompt, max_tokens=TOKENS, ignore_eos=True).raise_for_status()

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(one, range(REQUESTS)))
        return ids

    def routed(self, *ranks: int) -> Integers:
        """Tokens of each expert since the start, by vLLM's account on these ranks."""
        found = [np.fromfile(self.folder / f"routed-{rank}", dtype=np.int64) for rank in ranks]
        total: Integers = np.sum(found, axis=0)
        return total


def number(step: Trace) -> int:
    found = step.spans[0].attributes[a.STEP_NUMBER]
    assert isinstance(found, int)
    return found


def linked(span: Span) -> set[str]:
    return {link.trace_id for link in span.links}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def data_parallel(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("dp"), receiver, kind="moe", engines=RANKS)
    with serving(server):
        yield server


def test_steps_of_two_data_parallel_ranks(data_parallel: Server, receiver: Receiver) -> None:
    before = number(data_parallel.settled(0)[-1])
    already = data_parallel.routed(*range(RANKS))
    ids = data_parallel.ask("steps")
    traces = data_parallel.settled(before)
    routed = data_parallel.routed(*range(RANKS)) - already
    assert [fault for trace in traces for fault in step_faults(trace)] == []
    steps = read_steps(traces)
    assert (steps.partial, set(steps.rank.tolist())) == (0, {0, 1})
    assert steps.expert_tokens.tolist() == routed.tolist()
    assert steps.tokens.sum() * LAYERS * CHOICES == routed.sum()
    check_links(traces, ids, receiver, RANKS)
    check_kv_read(traces, ids, receiver)
    assert check([*traces, *map(receiver.trace, ids)]).findings == []


def check_links(traces: list[Trace], ids: list[str], receiver: Receiver, ranks: int) -> None:
    """Each request links to the steps that ran it, and they to its caller."""
    known = {trace.trace_id: trace for trace in traces}
    assert {i for trace in traces for span in trace.spans for i in linked(span)} == set(ids)
    for trace_id in ids:
        spans = receiver.wait(trace_id, 4)
        prefill = next(span for span in spans if span.name == a.PREFILL_SPAN)
        decode = next(span for span in spans if span.name == a.DECODE_SPAN)
        assert len(prefill.links) >= 1
        assert len(prefill.links) + len(decode.links) == TOKENS
        for link in (*prefill.links, *decode.links):
            step = next(span for span in known[link.trace_id].spans if span.span_id == link.span_id)
            assert step.attributes[a.DP_RANK] == prefill.attributes[a.DP_RANK]
            assert trace_id in linked(step)
            assert len(known[link.trace_id].spans) == ranks


def check_kv_read(traces: list[Trace], ids: list[str], receiver: Receiver) -> None:
    """Attention reads a request's prompt in its first step, and a token more in each further one."""
    prompts = [receiver.trace(trace_id).named(a.SERVER_SPAN)[0].attributes[a.VLLM_PROMPT_TOKENS] for trace_id in ids]
    read = [span.attributes[a.STEP_KV_READ_TOKENS] for trace in traces for span in trace.spans]
    assert sum(read) == TOKENS * sum(prompts) + len(ids) * sum(range(TOKENS))  # type: ignore[arg-type]


def test_a_rank_slowed_on_purpose_is_named_with_its_delay(data_parallel: Server) -> None:
    usual = measured(data_parallel, "usual")
    for rank in range(RANKS):
        with data_parallel.slowed(rank, DELAY_MS):
            first = stragglers(measured(data_parallel, f"slow {rank}"))[0]
        assert (first.rank, first.phase) == (rank, "experts"), (first, stragglers(usual))
        assert first.share > 0.75
        injected, found = LAYERS * DELAY_MS, first.delay_ms - lag_ms(usual, rank)
        assert 0.85 * injected < found < 1.35 * injected, (first, stragglers(usual))


def lag_ms(steps: Steps, rank: int) -> float:
    """How much later than the other rank this one comes to the collectives of a step, in the median."""
    inside = steps.phases[:, COLLECTIVES].sum(axis=1)
    return float(np.median(inside[steps.rank != rank] - inside[steps.rank == rank]))


def measured(server: Server, name: str) -> Steps:
    before = number(server.settled(0)[-1])
    server.ask(name)
    return read_steps(server.settled(before))


def test_a_skewed_router_of_two_tensor_parallel_ranks(receiver: Receiver, tmp_path: Path) -> None:
    with receiving() as own:
        arguments = ("--tensor-parallel-size", str(RANKS), "--distributed-executor-backend", "mp")
        server = Server(tmp_path, own, *arguments, kind="skewed", engines=1)
        with serving(server):
            before = number(server.settled(0)[-1])
            already = server.routed(0)
            ids = server.ask("skew")
            traces = server.settled(before)
            routed = server.routed(0) - already  # both ranks route the same tokens
            check_links(traces, ids, own, RANKS)
    assert [fault for trace in traces for fault in step_faults(trace)] == []
    steps = read_steps(traces)
    assert steps.expert_tokens.tolist() == routed.tolist()
    load = expert_load(steps.expert_tokens)
    assert load is not None
    assert set(load.top[:4]) == {*EVEN, *ODD}
    assert sum(load.shares[:4]) == 1.0
    assert load.shares[:4] == [routed[expert] / routed.sum() for expert in load.top[:4]]
    assert all(steps.phases[:, 3] > 0), "the all-reduce after a layer is combine"


def test_data_and_tensor_parallel_ranks_together(tmp_path: Path) -> None:
    """Each of the two tensor-parallel ranks of an engine routes half of its tokens."""
    ranks = 2 * RANKS
    with receiving() as own:
        arguments = ("--tensor-parallel-size", str(RANKS), "--distributed-executor-backend", "mp")
        server = Server(tmp_path, own, *arguments, kind="moe", engines=RANKS, ranks=ranks)
        with serving(server):
            before = number(server.settled(0)[-1])
            already = server.routed(*range(ranks))
            ids = server.ask("all")
            traces = server.settled(before)
            routed = server.routed(*range(ranks)) - already
            check_links(traces, ids, own, ranks)
    assert [fault for trace in traces for fault in step_faults(trace)] == []
    steps = read_steps(traces)
    assert (steps.partial, set(steps.rank.tolist())) == (0, {*range(ranks)})
    places = {(s.attributes[a.WORLD_RANK], s.attributes[a.DP_RANK], s.attributes[a.TP_RANK]) for s in traces[0].spans}
    assert places == {(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)}
    assert (steps.expert_tokens <= routed).all(), "vLLM's capture has what a part was padded with, too"
    engines = [span.attributes for trace in traces for span in trace.spans if span.attributes[a.TP_RANK] == 0]
    tokens = sum(int(each[a.STEP_PREFILL_TOKENS]) + int(each[a.STEP_DECODE_TOKENS]) for each in engines)  # type: ignore[arg-type]
    assert steps.expert_tokens.sum() == tokens * LAYERS * CHOICES
    assert check([*traces, *map(own.trace, ids)]).findings == []


def test_all_steps_of_a_slow_request_are_traced_on_both_data_parallel_ranks(tmp_path: Path) -> None:
    """One rank halts in a step. The other rank has no request, and computes for those of the slow one."""
    with receiving() as own:
        server = Server(tmp_path, own, kind="moe", engines=RANKS, every=NEVER)
        with serving(server), ThreadPoolExecutor(1) as pool:
            usual, trace_id = new_trace_id(), new_trace_id()
            server.complete(usual, prompt="as usual", max_tokens=TOKENS, ignore_eos=True).raise_for_status()
            answer = pool.submit(server.complete, trace_id, prompt="slow", max_tokens=LONG, ignore_eos=True)
            time.sleep(1.0)
            with server.slowed(0, HALT_MS):
                time.sleep(2 * LAYERS * HALT_MS / 1000)
            answer.result().raise_for_status()
            check_window(own, server, trace_id)
            assert not any(span.links for span in own.wait(usual, 4))
            dummies = [span.attributes[a.STEP_DUMMY] for t in server.step_traces() for span in t.spans]
            assert dummies.count(True) == WINDOW


def test_steps_of_a_request_that_asks_for_them_with_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    with receiving() as own:
        arguments = ("--tensor-parallel-size", str(RANKS), "--distributed-executor-backend", "mp")
        server = Server(tmp_path, own, *arguments, kind="moe", engines=1, every=NEVER)
        with serving(server):
            trace_id = new_trace_id()
            headers = in_trace(trace_id) | {"tracestate": "llmtrace=steps"}
            body = {"model": MODEL, "prompt": "all steps", "max_tokens": 2 * WINDOW, "ignore_eos": True}
            server.client.post("/v1/completions", json=body, headers=headers).raise_for_status()
            check_window(own, server, trace_id)


def check_window(receiver: Receiver, server: Server, trace_id: str) -> None:
    """One window of steps without gaps is traced, on every rank, and nothing else; the request links to all of it."""
    decode = next(span for span in receiver.wait(trace_id, 4) if span.name == a.DECODE_SPAN)
    traces: list[Trace] = until(server.window, "the spans of every rank in every step", SETTLE_S, poll_s=0.5)
    time.sleep(QUIET_S)
    assert len(server.step_traces()) == len(traces) == WINDOW
    first = number(traces[0])
    assert [number(trace) for trace in traces] == [*range(first, first + WINDOW)]
    assert {span.attributes[a.STEP_REASON] for trace in traces for span in trace.spans} == {a.REASON_ON_DEMAND}
    assert [fault for trace in traces for fault in step_faults(trace)] == []
    assert linked(decode) == {trace.trace_id for trace in traces}
    assert all(any(trace_id in linked(span) for span in trace.spans) for trace in traces)
    assert check([*traces, receiver.trace(trace_id)]).findings == []
