"""A fault in any of the plugin's functions, on a running server: requests are answered as ever, one line in the log
names the place, and no more spans come from that process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest
from engine_faults import FILE, INSTALL, SECRET
from engine_servers import CHECKOUT, MODEL, ModelServer, describe_package, in_trace, new_trace_id, serving, tiny_model
from engine_trees import trees
from engine_workload import LIKELY, STOPS, Planned, completion, send
from loopback import Receiver, receiving, until

from llmtrace.engine.compat import HOOKS
from llmtrace.engine.plugin import Plugin
from llmtrace.semconv import attributes as names

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

BODIES = Plugin().bodies() | Plugin().step_bodies()
HOOKED = {
    body.__name__: f"{hook.owner}.{hook.function}" for hook in HOOKS for body in BODIES[hook.name] if body is not None
}
"""Every function that a hook runs, and what the log calls its place."""
AT_START, WITH_A_DEVICE = "_configured", "_device_ready"
"""Run once, when a server starts: in the API server, and in the engine core."""
OF_RANKS = ("_joining", "_dummy")
"""Run where data-parallel ranks wait for each other."""
PLACES = {
    **{body: place for body, place in HOOKED.items() if body not in (AT_START, WITH_A_DEVICE, *OF_RANKS)},
    "_seen": "SpanProcessor.on_start",
    "_make": "making spans",
}
DROPS = ("publish", "the metric of drops")
"""Runs once, with the first span of a server."""
IN_STEPS = (
    *("_look", "_dummy", "_count", "_note_step", "_admitted"),
    *("_beginning", "_beginning_dummy", "_ended", "_forward_begins", "routed", "before", "after", "_make"),
)
"""What runs for the steps of a mixture of experts: in the engine core, and in its worker; of the phases' marks any."""
RANKS = 2
FAULTS = [(*DROPS, "before"), *((*place, moment) for place in PLACES.items() for moment in ("before", "after"))]
API_SERVER, ENGINE_CORE = "APIServer", "EngineCore"
"""What vLLM puts before the lines of a process in the log."""
FAULT = "llmtrace: fault in "
SHIM = CHECKOUT / "playbooks/roles/servers/files"
"""What vLLM's CPU back end lacks of expert parallelism."""
ANSWERS = {"max_tokens": 6, "temperature": 0.5, "seed": 5, "ignore_eos": True}


class Faulty:
    """A server with the plugin that makes the other one fail."""

    def __init__(self, folder: Path, receiver: Receiver, *experts: str, **environment: str) -> None:
        """With arguments, a mixture of experts on data-parallel ranks."""
        plugin = folder / "plugin"
        describe_package(plugin, "llmtrace-faults", "0", "[vllm.general_plugins]\nfaults = engine_faults:register\n")
        shutil.copy(Path(__file__).with_name("engine_faults.py"), plugin)
        self._order = folder / "order.json"
        self._run = 0
        self.receiver = receiver
        self.order()
        self.server = ModelServer(
            folder,
            receiver,
            *("--max-model-len", "4096", "--max-num-seqs", "4", *experts),
            engines=RANKS if experts else 1,
            path=[plugin, *([SHIM] if experts else [])],
            environment={FILE: str(self._order), **environment},
            model=tiny_model("moe") if experts else None,
        )

    def order(self, place: str = "", moment: str = "before") -> None:
        self._run += 1
        new = self._order.with_suffix(".new")
        new.write_text(json.dumps({"run": self._run, "place": place, "moment": moment}))
        new.replace(self._order)

    def faults(self) -> list[str]:
        return [line for line in self.server.text().splitlines() if FAULT in line]

    def answers(self, trace_id: str | None = None) -> list[str]:
        """What the server says to the same request each time, whole and streamed, and to one of two choices."""
        body = {"model": MODEL, "prompt": "The same as ever", **ANSWERS}
        client, headers = self.server.client, in_trace(trace_id)
        whole = client.post("/v1/completions", json=body, headers=headers).raise_for_status()
        lines = client.post("/v1/completions", json={**body, "stream": True}, headers=headers).raise_for_status().text
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines.splitlines() if line.startswith("data: {")]
        choices = client.post("/v1/completions", json={**body, "n": 2}, headers=headers).raise_for_status()
        return [
            *(choice["text"] for choice in whole.json()["choices"]),
            "".join(chunk["choices"][0]["text"] for chunk in chunks),
            *(choice["text"] for choice in choices.json()["choices"]),
        ]

    @cached_property
    def usual(self) -> list[str]:
        """The answers while all is well."""
        return self.answers()

    def give_up(self) -> Planned:
        """Hang up in the middle of a stream; the request that did."""
        request = completion("given up", "z" * 40, 3900, stream=True, hang_up_after=4)
        asyncio.run(send(self.server, [request], 1))
        return request

    def stop(self) -> None:
        """A stop string, which the API server finds and tells the engine of."""
        request = completion("stop string", "s" * 40, 100, stop=STOPS, logit_bias=LIKELY)
        asyncio.run(send(self.server, [request], 1))

    def check_silence(self, process: str) -> None:
        """The plugin, off in ``process``, gives no spans; vLLM's come, as it makes them if it is off where it does."""
        given_up = self.give_up()
        trace_id = new_trace_id()
        assert self.answers(trace_id) == self.usual
        spans = self.receiver.wait(trace_id, 4)
        assert [span.name for span in spans] == [names.SERVER_SPAN] * 4
        assert process == ENGINE_CORE or all(names.FINISH_REASONS not in span.attributes for span in spans)
        # Nothing, or, where the server noticed too late that the client is gone, what vLLM makes for any request.
        late = self.receiver.of(given_up.trace_id)
        assert [span.name for span in late] in ([], [names.SERVER_SPAN])
        assert process == ENGINE_CORE or all(names.FINISH_REASONS not in span.attributes for span in late)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def faulty(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    faulty = Faulty(tmp_path_factory.mktemp("faulty"), receiver)
    with serving(faulty.server):
        assert faulty.usual
        yield faulty


@pytest.mark.parametrize(("function", "place", "moment"), FAULTS, ids=lambda value: value.replace(" ", "-"))
def test_fault(faulty: Faulty, function: str, place: str, moment: str) -> None:
    known = len(faulty.faults())
    faulty.order(function, moment)
    assert faulty.answers(new_trace_id()) == faulty.usual
    faulty.stop()
    faulty.give_up()
    until(lambda: len(faulty.faults()) > known, f"the fault in {function}")
    (line,) = faulty.faults()[known:]
    process = line.removeprefix("(").split()[0]
    assert process == (ENGINE_CORE if place.startswith("Scheduler.") else API_SERVER)
    faulty.check_silence(process)
    assert faulty.faults()[known:] == [line]
    assert f"{FAULT}{place} (RuntimeError in faulty, line " in line
    assert SECRET not in faulty.server.text()


def test_everything_works_when_nothing_fails(faulty: Faulty, receiver: Receiver) -> None:
    """Last: what the faults left behind does no harm once the plugin is on."""
    known = len(faulty.faults())
    faulty.order()
    trace_id = new_trace_id()
    assert faulty.answers(trace_id) == faulty.usual
    given_up = faulty.give_up()
    assert len(receiver.wait(trace_id, 16)) == 16
    assert [tree.order for tree in trees(receiver.trace(trace_id))] == [["queue", "prefill", "decode"]] * 4
    assert len(receiver.wait(given_up.trace_id, 4)) == 4
    assert [tree.reason for tree in trees(receiver.trace(given_up.trace_id))] == ["abort"]
    assert faulty.faults()[known:] == []


def test_fault_at_the_start(receiver: Receiver, tmp_path: Path) -> None:
    """In the API server when it reads its configuration; in the engine core when the plugin is put in."""
    faulty = Faulty(tmp_path, receiver, **{INSTALL: "1"})
    faulty.order(AT_START)
    with serving(faulty.server):
        assert len(faulty.usual) == 4
        faulty.stop()
        faulty.check_silence(API_SERVER)
    (line,) = faulty.faults()
    assert f"{FAULT}{HOOKED[AT_START]} (RuntimeError in faulty, line " in line
    assert line.startswith(f"({API_SERVER} ")
    lines = [line for line in faulty.server.text().splitlines() if "llmtrace: no engine spans: RuntimeError" in line]
    assert any(line.startswith(f"({ENGINE_CORE} ") for line in lines)
    assert not any(line.startswith(f"({API_SERVER} ") for line in lines)
    assert SECRET not in faulty.server.text()


def test_fault_where_the_device_is_ready(receiver: Receiver, tmp_path: Path) -> None:
    faulty = Faulty(tmp_path, receiver)
    faulty.order(WITH_A_DEVICE)
    with serving(faulty.server):
        trace_id = new_trace_id()
        assert len(faulty.answers(trace_id)) == 4
        assert len(receiver.wait(trace_id, 16)) == 16, "only steps are off"
    (line,) = faulty.faults()
    assert f"{FAULT}{HOOKED[WITH_A_DEVICE]} (RuntimeError in faulty, line " in line


def test_faults_in_the_steps_of_a_mixture_of_experts(receiver: Receiver, tmp_path: Path) -> None:
    """Each switches the steps of its process off, in both processes; all requests are answered whole."""
    steps = {"LLMTRACE_STEP_EVERY": "1", "LLMTRACE_EXPERTS_EVERY": "1"}
    parallel = ("--enable-expert-parallel", "--worker-extension-cls", "cpu_expert_parallel.CpuExpertParallel")
    faulty = Faulty(tmp_path, receiver, *parallel, **steps)

    def ask() -> list[str]:
        """As many at once as give each rank some, and one of them no more in the end; the ids of their traces."""
        traces = {new_trace_id(): tokens for tokens in range(4, 44, 5)}

        def one(trace_id: str) -> int:
            asked = faulty.server.complete(trace_id, prompt="Any", max_tokens=traces[trace_id], ignore_eos=True)
            tokens: int = asked.raise_for_status().json()["usage"]["completion_tokens"]
            return tokens

        with ThreadPoolExecutor(len(traces)) as pool:
            assert list(pool.map(one, traces)) == list(traces.values())
        return list(traces)

    def lines() -> list[str]:
        return [line for line in faulty.faults() if ENGINE_CORE in line.split()[0]]

    with serving(faulty.server):
        for function in IN_STEPS:
            known = len(lines())
            faulty.order(function)
            ids = ask()
            until(lambda known=known: len(lines()) == known + RANKS, f"a fault in {function} of each rank")
            if function != "_make":  # which is of requests too, by name
                assert {len(receiver.wait(trace_id, 4)) for trace_id in ids} == {4}, function
        faulty.order()
        known = len(lines())
        ids = ask()
        spans = [span for trace_id in ids for span in receiver.wait(trace_id, 4)]
        assert all(span.links for span in spans if span.name in (names.PREFILL_SPAN, names.DECODE_SPAN))
        assert len(lines()) == known
    assert SECRET not in faulty.server.text()
