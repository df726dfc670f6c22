from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picking import Handle, endpoint

from llmtrace.endpoints_file import parse, read
from llmtrace.errors import UserError
from llmtrace.picker import scrape
from llmtrace.picker.endpoints import STALE_AFTER_S, Pool
from llmtrace.picker.plugins.file_discovery import FileDiscovery, FileDiscoveryParameters

ONE = 'endpoints: [{name: a, address: 127.0.0.1, port: "8000"}]'
TWO = 'endpoints: [{name: a, address: 127.0.0.1, port: "8000"}, {name: b, address: 127.0.0.1, port: "8001"}]'


def discovery(path: Path, *, watch: bool = False) -> tuple[FileDiscovery, Pool]:
    handle = Handle()
    parameters = FileDiscoveryParameters.model_validate({"path": str(path), "watchFile": watch})
    return FileDiscovery("f", parameters, handle), handle.pool


def test_endpoints_are_read(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text('endpoints: [{name: a, namespace: n, address: 127.0.0.1, port: "8000", labels: {x: y}}]')
    plugin, pool = discovery(path)
    plugin.load()
    (found,) = pool
    assert (found.id, found.address, found.labels) == ("n/a", "127.0.0.1:8000", {"x": "y"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is no YAML"),
        ("[]", "wrong at the top level"),
        ("endpoints: 1", "wrong at endpoints"),
        ('endpoints: [{name: a, address: host, port: "1"}]', "'host' is no IPv4 address"),
        ('endpoints: [{name: a, address: "::1", port: "1"}]', "'::1' is no IPv4 address"),
        ('endpoints: [{name: a, address: 127.0.0.1, port: "0"}]', "'0' is no port"),
        ('endpoints: [{name: a, address: 127.0.0.1, port: "x"}]', "'x' is no port"),
        ("endpoints: [{name: a, address: 127.0.0.1, port: 80}]", "wrong at endpoints.0.port"),
        ('endpoints: [{address: 127.0.0.1, port: "80"}]', "wrong at endpoints.0.name"),
        (ONE[:-1] + ', {name: a, address: 127.0.0.1, port: "8001"}]', "names default/a more than once"),
        ("# " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(read(path), path)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text", ["", "endpoints: []"])
def test_an_empty_pool_is_allowed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text)
    assert parse(read(path), path) == []


async def eventually(condition: Callable[[], bool], what: str) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"waited 10 s for {what}")


async def test_changes_are_taken_up_while_running(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(ONE)
    plugin, pool = discovery(path, watch=True)
    plugin.load()
    kept = next(iter(pool))
    task = asyncio.create_task(plugin.watch())
    try:
        await asyncio.sleep(0.2)  # the watch needs a moment to begin
        replacement = tmp_path / "new"
        replacement.write_text(TWO)
        replacement.replace(path)
        await eventually(lambda: len(pool) == 2, "the second endpoint")
        assert kept in list(pool), "an endpoint that stays keeps its load"
        path.write_text("endpoints: [broken")
        (tmp_path / "unrelated").write_text("x")
        await asyncio.sleep(0.3)
        assert len(pool) == 2, "a file that cannot be read changes nothing"
        path.write_text("endpoints: []")
        await eventually(lambda: len(pool) == 0, "the empty pool")
    finally:
        task.cancel()


def test_another_address_is_another_server() -> None:
    pool, removed = Pool("p"), []
    pool.on_removal(removed.append)
    first, second = endpoint(0), endpoint(0)
    second.address = "10.9.9.9:8000"
    pool.replace([first])
    pool.replace([second])
    assert removed == [first.id]
    assert list(pool) == [second]


def test_ready_means_answered_lately() -> None:
    found = endpoint(0)
    assert found.answered_at is not None
    assert found.ready(found.answered_at + STALE_AFTER_S)
    assert not found.ready(found.answered_at + STALE_AFTER_S + 1)
    assert not endpoint(1, ready=False).ready()
    pool = Pool("p")
    pool.replace([found, endpoint(1, ready=False), endpoint(2)])
    assert [each.name for each in pool.ready()] == ["vllm-0", "vllm-2"]
    assert [each.name for each in pool.ready(frozenset({"10.0.0.3"}))] == ["vllm-2"]


PAGE = """\
# HELP vllm:num_requests_waiting x
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="x"} 9.0
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.1
vllm:cache_config_info{block_size="32",num_gpu_blocks="728",engine="0"} 1.0
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 7
"""


def test_load_is_read_from_vllms_metrics() -> None:
    load = scrape.parse(PAGE)
    assert (load.waiting, load.running, load.block_size, load.num_blocks) == (4, 2, 32, 728)
    assert load.kv_cache_usage == pytest.approx(0.3)
    assert load.waiting_known
    assert scrape.parse("").waiting == 0
    assert not scrape.parse('vllm:num_requests_running{engine="0"} 1').waiting_known


@given(st.text(max_size=200))
def test_no_page_does_harm(text: str) -> None:
    with suppress(ValueError):
        scrape.parse("vllm:num_requests_waiting" + text)


@pytest.mark.parametrize(
    ("answer", "ready", "waiting"),
    [
        (httpx.Response(200, text=PAGE), True, 4),
        (httpx.Response(404), True, 0),
        (httpx.Response(200, text="vllm:num_requests_waiting{"), True, 0),
        (httpx.ConnectError("refused"), False, 0),
        (httpx.ReadTimeout("slow"), False, 0),
    ],
)
async def test_scraping(answer: Any, ready: bool, waiting: int) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://10.0.0.1:8000/metrics"
        if isinstance(answer, Exception):
            raise answer
        return answer

    pool = Pool("p")
    pool.replace([endpoint(0, ready=False)])
    scraper = scrape.Scraper(pool, 1)
    scraper._client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
    await scraper.once(pool)
    (found,) = pool
    assert (found.ready(), found.load.waiting) == (ready, waiting)


async def test_a_server_that_refuses_is_not_ready_at_once_and_a_slow_one_later() -> None:
    answers: list[Exception] = [httpx.ReadTimeout("slow"), httpx.ConnectError("refused")]

    def respond(_: httpx.Request) -> httpx.Response:
        raise answers.pop(0)

    pool = Pool("p")
    pool.replace([endpoint(0)])
    scraper = scrape.Scraper(pool, 1)
    scraper._client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
    (found,) = pool
    await scraper.once(pool)
    assert found.ready()
    await scraper.once(pool)
    assert not found.ready()
