"""``kv_load`` on real servers: one prefills, the other pulls its KV by NIXL.

The protocol is that of llm-d's sidecar (nixlv2): the prefill leg asks for one token and gets kv_transfer_params; the
decode leg is the same request with these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_servers import BLOCK_SIZE, ModelServer, in_trace, new_trace_id, nixl_folder, serving
from engine_trees import Tree, settle, trees
from loopback import Receiver, free_port, sample_sum, until

from llmtrace.semconv import attributes as names

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]

SPAN_MS = 0.001
"""Spans against vLLM's own times: the rounding of seconds to nanoseconds."""
TRANSFER_MS = 0.001
"""The sum of the transfers against NIXL's histogram, whose telemetry has microseconds."""
BLOCK_BYTES = 2 * 2 * 2 * 32 * 2 * BLOCK_SIZE
"""Of the tiny model: two layers, keys and values, two heads of 32 numbers of two bytes, for each token."""
ASK = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
DECODE = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


def server_of(folder: Path, receiver: Receiver, role: str, policy: str) -> ModelServer:
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": policy,
    }
    return ModelServer(
        folder,
        receiver,
        *("--max-model-len", "2048", "--kv-transfer-config", json.dumps(transfer)),
        path=[nixl_folder()],
        environment={"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
    )


@pytest.fixture(scope="module")
def pair(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelServer, ModelServer]]:
    """A server that prefills and one that decodes; the first can also load, and then fails what it cannot load."""
    folder = tmp_path_factory.mktemp("pair")
    pair = server_of(folder, receiver, "kv_both", "fail"), server_of(folder, receiver, "kv_consumer", "recompute")
    with serving(*pair):
        yield pair


def prefill(server: ModelServer, prompt: str, trace_id: str | None = None) -> dict[str, Any]:
    """The prefill leg; returns the kv_transfer_params for the decode leg."""
    asked = {"do_remote_decode": True, "do_remote_prefill": False, **ASK}
    answer = server.complete(trace_id, prompt=prompt, max_tokens=1, kv_transfer_params=asked).raise_for_status()
    found: dict[str, Any] = answer.json()["kv_transfer_params"]
    return found


def decode(server: ModelServer, prompt: str, params: Mapping[str, Any], trace_id: str) -> httpx.Response:
    return server.complete(trace_id, prompt=prompt, kv_transfer_params=params, **DECODE)


def nowhere(prompt: str, **changes: object) -> dict[str, Any]:
    """What a prefill leg would return for ``prompt``, of a server that is not there."""
    blocks = -(-len(prompt) // BLOCK_SIZE)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": f"gone-{new_trace_id()}",
        "remote_request_id": "cmpl-gone",
        "remote_block_ids": [list(range(1, blocks + 1))],
        "remote_host": "127.0.0.1",
        "remote_port": free_port(),
        "tp_size": 1,
        "remote_num_tokens": len(prompt),
        **changes,
    }


def tree_of(receiver: Receiver, trace_id: str) -> Tree:
    (tree,) = trees(receiver.trace(trace_id))
    return tree


def check_load(tree: Tree, prompt: str, local: int = 0, *, failed: bool = False) -> None:
    """``local`` is how many of the prompt's blocks the server had itself."""
    load = next(span for span in tree.phases if span.name == names.KV_LOAD_SPAN)
    blocks = -(-len(prompt) // BLOCK_SIZE) - local
    assert load.attributes[names.KV_LOAD_TOKENS] == len(prompt) - local * BLOCK_SIZE
    assert load.attributes[names.KV_LOAD_BLOCKS] == blocks
    assert load.attributes[names.KV_LOAD_BYTES] == blocks * BLOCK_BYTES
    assert load.attributes[names.KV_LOAD_FAILED] is failed
    assert tree.ms("queue", "kv_load") == pytest.approx(1000 * tree.vllm("gen_ai.latency.time_in_queue"), abs=SPAN_MS)
    assert 0 < load.duration_ms < 1000 * tree.vllm("gen_ai.latency.time_to_first_token")


PROMPTS = ("a" * 500, "a" * 500 + "b" * 200, "c" * 20, "d" * 64, "e" * 1500)
LOCAL = (0, 15, 0, 0, 0)
"""Blocks of each prompt that the decode server has from the ones before."""


def test_loads_one_after_the_other(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    producer, consumer = pair
    before = consumer.metrics()
    traces = []
    for prompt in PROMPTS:
        trace_id = new_trace_id()
        answer = decode(consumer, prompt, params := prefill(producer, prompt), trace_id).raise_for_status().json()
        alone = producer.complete(prompt=prompt, **DECODE).json()
        assert answer["choices"][0]["text"] == alone["choices"][0]["text"], "the KV is not what it should be"
        traces.append((trace_id, params))
    settle(consumer, receiver)
    after = consumer.metrics()

    def grown(name: str) -> float:
        return sample_sum(after, f"vllm:{name}") - sample_sum(before, f"vllm:{name}")

    found = [tree_of(receiver, trace_id) for trace_id, _ in traces]
    for tree, prompt, local, (_, params) in zip(found, PROMPTS, LOCAL, traces, strict=True):
        check_load(tree, prompt, local)
        assert tree.said(names.KV_LOAD_REMOTE_ENGINE) == params["remote_engine_id"]
        assert 0 < tree.number(names.KV_LOAD_TRANSFER_TIME) <= tree.ms("kv_load")
        assert tree.number(names.LOCAL_CACHED_TOKENS) == local * BLOCK_SIZE
        assert tree.number(names.EXTERNAL_CACHED_TOKENS) == tree.number(names.KV_LOAD_TOKENS)
        # What the prefill server had cached: the user's view of the whole request.
        assert tree.request.attributes[names.CACHED_TOKENS] == params["remote_prefill_cached_tokens"]
    assert sum(tree.number(names.KV_LOAD_BYTES) for tree in found) == grown("nixl_bytes_transferred_sum")
    assert sum(tree.number(names.KV_LOAD_TOKENS) for tree in found) == grown("external_prefix_cache_hits_total")
    assert grown("nixl_xfer_time_seconds_count") == len(found)
    transfers = sum(tree.number(names.KV_LOAD_TRANSFER_TIME) for tree in found)
    assert transfers == pytest.approx(1000 * grown("nixl_xfer_time_seconds_sum"), abs=TRANSFER_MS)


def test_loads_side_by_side(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    """Twelve at once, every third of them not sampled: bytes are told for each, NIXL's time where it is clear whose."""
    producer, consumer = pair
    prompts = [f"{number:02d}" + "f" * (100 + 90 * number) for number in range(12)]
    params = [prefill(producer, prompt) for prompt in prompts]
    traces = [new_trace_id() for _ in prompts]
    before = consumer.metrics()

    def one(number: int) -> None:
        consumer.client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": prompts[number], "kv_transfer_params": params[number], **DECODE},
            headers=in_trace(traces[number], sampled=number % 3 > 0),
        ).raise_for_status()

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(one, range(len(prompts))))
    settle(consumer, receiver)
    after = consumer.metrics()
    expected = transfers = 0.0
    for number, prompt in enumerate(prompts):
        expected += -(-len(prompt) // BLOCK_SIZE) * BLOCK_BYTES
        if number % 3 == 0:
            assert receiver.of(traces[number]) == []
            continue
        tree = tree_of(receiver, traces[number])
        check_load(tree, prompt)
        transfers += tree.number(names.KV_LOAD_TRANSFER_TIME)
    sums = [sample_sum(page, "vllm:nixl_bytes_transferred_sum") for page in (before, after)]
    assert sums[1] - sums[0] == expected
    times = [1000 * sample_sum(page, "vllm:nixl_xfer_time_seconds_sum") for page in (before, after)]
    assert transfers <= times[1] - times[0] + TRANSFER_MS


def test_prefill_leg_has_no_load(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    trace_id = new_trace_id()
    prefill(pair[0], "g" * 200, trace_id)
    settle(pair[0], receiver)
    assert tree_of(receiver, trace_id).order == ["queue", "prefill"]


def test_unified_requests_have_no_load(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    trace_id = new_trace_id()
    pair[1].complete(trace_id, prompt="h" * 200, **DECODE).raise_for_status()
    settle(pair[1], receiver)
    assert tree_of(receiver, trace_id).order == ["queue", "prefill", "decode"]


def test_load_that_fails_is_computed_instead(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    """From nobody: a port that does not answer, a host that does not exist; with and without a beginning of its own."""
    _, consumer = pair
    consumer.complete(prompt="i" * 300, **DECODE).raise_for_status()
    cases = (
        ("j" * 300, 0, {}),
        ("k" * 300, 0, {"remote_host": "192.0.2.1"}),
        ("i" * 300 + "l" * 100, 9, {}),
    )
    traces = [new_trace_id() for _ in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = pool.map(
            lambda case, trace_id: decode(consumer, case[0], nowhere(case[0], **case[2]), trace_id), cases, traces
        )
        assert [answer.status_code for answer in answers] == [200, 200, 200]
    settle(consumer, receiver)
    for (prompt, local, _), trace_id in zip(cases, traces, strict=True):
        tree = tree_of(receiver, trace_id)
        check_load(tree, prompt, local, failed=True)
        assert str(tree.said(names.KV_LOAD_REMOTE_ENGINE)).startswith("gone-")
        assert tree.said(names.KV_LOAD_TRANSFER_TIME) is None
        assert tree.number(names.EXTERNAL_CACHED_TOKENS) == 0
        assert tree.number(names.LOCAL_CACHED_TOKENS) == local * BLOCK_SIZE
        assert tree.number(names.COMPUTED_TOKENS) == len(prompt) - local * BLOCK_SIZE
        assert {span.status for span in (tree.request, *tree.phases)} == {"UNSET"}


def test_client_that_hangs_up_during_a_load(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    _, consumer = pair
    trace_id, prompt = new_trace_id(), "m" * 300
    with suppress(httpx.ReadTimeout):
        consumer.client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": prompt, "kv_transfer_params": nowhere(prompt), **DECODE},
            headers=in_trace(trace_id),
            timeout=1.0,
        )
        pytest.fail("the load did not last")
    until(lambda: receiver.of(trace_id), "the spans of a request that was given up")
    settle(consumer, receiver)
    tree = tree_of(receiver, trace_id)
    assert tree.order == ["queue", "kv_load"]
    assert tree.reason == "abort"
    assert len(tree.events(names.ABORT_EVENT)) == 1


def test_load_that_fails_the_request(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    """With kv_load_failure_policy "fail", which llm-d's guides set."""
    server, _ = pair
    trace_id, prompt = new_trace_id(), "o" * 300
    answer = decode(server, prompt, nowhere(prompt), trace_id)
    assert answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
    settle(server, receiver)
    tree = tree_of(receiver, trace_id)
    assert tree.order == ["queue", "kv_load"]
    assert tree.reason == "error"
    assert [span.status for span in tree.phases] == ["UNSET", "ERROR"]
    assert tree.said(names.KV_LOAD_FAILED) is True
    assert tree.number(names.KV_LOAD_BLOCKS) == 10


def test_prefill_server_dies_before_its_kv_is_pulled(pair: tuple[ModelServer, ModelServer], receiver: Receiver) -> None:
    """Last on this pair: the producer does not come back."""
    producer, consumer = pair
    trace_id, prompt = new_trace_id(), "n" * 700
    params = prefill(producer, prompt)
    producer.kill()
    answer = decode(consumer, prompt, params, trace_id)
    assert answer.status_code == httpx.codes.OK
    settle(consumer, receiver)
    tree = tree_of(receiver, trace_id)
    check_load(tree, prompt, failed=True)
    assert tree.number(names.COMPUTED_TOKENS) == len(prompt)
