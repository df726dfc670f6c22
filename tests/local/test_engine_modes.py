"""The plugin where vLLM works otherwise: speculative decoding, data parallelism, several API servers."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from engine_servers import MODEL, ModelServer, in_trace, new_trace_id, serving, tiny_adapter
from engine_trees import settle, trees
from engine_workload import Planned, completion, mixed, send
from loopback import Receiver, sample_sum, until

from llmtrace.semconv import attributes as names
from llmtrace.traces.model import Span

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]

RANKS = API_SERVERS = 2
SPANS_S = 60.0
"""An export may take as long where the engines and API servers of the test have all processors."""


def test_speculative_decoding(receiver: Receiver, tmp_path: Path) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    server = ModelServer(
        tmp_path, receiver, *("--max-model-len", "1024", "--speculative-config", json.dumps(speculation))
    )
    # A model without sense repeats itself where it is greedy, and does not where it is not.
    planned = [
        completion("speculation", f"{number} one two one two one two", 40 + number, temperature=number % 2)
        for number in range(20)
    ]
    with serving(server):
        before = server.metrics()
        asyncio.run(send(server, planned, 8))
        after = server.metrics()
        settle(server, receiver)
    found = [tree for request in planned for tree in trees(receiver.trace(request.trace_id))]
    assert len(found) == len(planned)
    for name, attribute in (
        ("num_draft_tokens", names.DRAFT_TOKENS),
        ("num_accepted_tokens", names.ACCEPTED_TOKENS),
    ):
        grown, past = (sample_sum(page, f"vllm:spec_decode_{name}_total") for page in (after, before))
        assert sum(tree.number(attribute) for tree in found) == grown - past > 0
    for tree in found:
        drafts = tree.number(names.DRAFT_TOKENS)
        if drafts:
            assert tree.said(names.ACCEPTANCE_RATE) == tree.number(names.ACCEPTED_TOKENS) / drafts
        assert tree.number(names.OUTPUT_TOKENS) == tree.vllm(names.VLLM_COMPLETION_TOKENS)


def test_adapters_by_a_server_that_opentelemetrys_variables_switched_on(receiver: Receiver, tmp_path: Path) -> None:
    adapter = f"tiny-adapter={tiny_adapter(tmp_path / 'adapter')}"
    arguments = ("--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", adapter)
    server = ModelServer(tmp_path, receiver, *arguments, flag=False)
    plain = [completion("plain", f"{number} without", 4) for number in range(3)]
    adapted = [completion("adapted", f"{number} with", 4, model="tiny-adapter") for number in range(3)]
    with serving(server):
        asyncio.run(send(server, [*plain, *adapted], 6))
        settle(server, receiver)
    for request in (*plain, *adapted):
        (tree,) = trees(receiver.trace(request.trace_id))
        said = {span.attributes.get(names.LORA) for span in tree.phases}
        assert said == {"tiny-adapter" if request.kind == "adapted" else None}


def api_server_of(span: Span) -> object:
    """The process that sent the span."""
    return span.resource["vllm.process_id"]


def test_two_engines_behind_two_api_servers(receiver: Receiver, tmp_path: Path) -> None:
    """Each request once, with the rank of the engine that had it; also one whose client hangs up."""
    server = ModelServer(
        tmp_path,
        receiver,
        *("--max-model-len", "4096", "--max-num-seqs", "4"),
        *("--api-server-count", str(API_SERVERS)),
        engines=RANKS,
    )
    planned = mixed(39, seed=11)
    given_up = [completion("given up", f"{number} z", 3900, stream=True, hang_up_after=4) for number in range(6)]
    with serving(server):
        before = server.metrics()
        asyncio.run(send(server, planned, 12))
        after = server.metrics()
        asyncio.run(send(server, given_up, 6))
        wait_for_all(server, receiver, [*planned, *given_up])
    found = [tree for request in planned for tree in trees(receiver.trace(request.trace_id))]
    assert len(found) == sum(request.engine_requests for request in planned)
    ranks = Counter(tree.said(names.DP_RANK) for tree in found)
    for rank in range(RANKS):
        grown, past = (sample_sum(page, "vllm:request_success_total", engine=str(rank)) for page in (after, before))
        assert ranks[rank] == grown - past > 0
    for tree in found:
        assert len({span.attributes[names.DP_RANK] for span in tree.phases}) == 1
        assert {api_server_of(span) for span in tree.phases} == {api_server_of(tree.request)}
    assert len({api_server_of(tree.request) for tree in found}) == API_SERVERS
    ended = Counter(tree.reason for request in given_up for tree in trees(receiver.trace(request.trace_id)))
    # "length" where the server noticed too late that the client is gone.
    assert ended.total() == len(given_up), ended
    assert ended.keys() <= {"abort", "length"}


def wait_for_all(server: ModelServer, receiver: Receiver, planned: list[Planned]) -> None:
    """Until every request's spans are there, and then until each API server has sent those of a later request."""

    def missing() -> list[str]:
        found = [(each, len(receiver.trace(each.trace_id).named(names.SERVER_SPAN))) for each in planned]
        return [f"{each.kind}: {count}" for each, count in found if count < each.engine_requests]

    try:
        until(lambda: not missing(), "every request's llm_request", SPANS_S)
    except pytest.fail.Exception as failure:
        said = [line for line in server.text().splitlines() if re.search("export|span|llmtrace|ERROR", line)]
        pytest.fail("\n".join([f"{failure}; there are only, of", *missing(), *said]))
    seen: set[object] = set()
    for _ in range(40):
        trace_id = new_trace_id()
        with server.connect() as another:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
            another.post("/v1/completions", json=body, headers=in_trace(trace_id)).raise_for_status()
        seen |= {api_server_of(span) for span in receiver.wait(trace_id, 3)}
        if len(seen) == API_SERVERS:
            return
    pytest.fail(f"40 requests went to {len(seen)} API server")
