"""What a replica's log and metrics tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaling import Replica, Web

from llmtrace.autoscale.replica import Probe, StartLog

LOG = """(APIServer pid=1) INFO 11-25 04:06:40 [api_utils.py:347] version 0.32.0
(EngineCore pid=2) INFO 11-25 04:06:46 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'
(EngineCore pid=2) INFO 11-25 04:06:47 [default_loader.py:501] Loading weights took 0.35 seconds
(EngineCore pid=2) INFO 11-25 04:06:48 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.21 s
"""
"""Lines as vLLM 0.32 writes them."""


def test_vllms_log_shows_how_far_its_start_has_come(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(LOG)  # of an earlier start
    log = StartLog(path)
    log.read()
    assert not log.loading
    lines = LOG.splitlines(keepends=True)
    seen = []
    for line in lines:
        with path.open("a") as file:
            file.write(line)
        log.read()
        seen.append((log.loading, log.loaded))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]


def test_a_line_counts_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    log = StartLog(path)
    path.write_text("INFO Initializing a V1 LLM")
    log.read()
    assert not log.loading
    path.write_text("INFO Initializing a V1 LLM engine\n")
    log.read()
    assert log.loading


def test_a_log_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text("x" * 5000 + "\n")
    log = StartLog(path)
    path.write_text(LOG)
    log.read()
    assert log.loaded


def test_the_last_error_is_kept_short_and_without_colours(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    log = StartLog(path)
    path.write_text("ValueError: first\n\x1b[31mERROR\x1b[0m " + "no memory " * 50 + "\nbye\n")
    log.read()
    assert log.error.startswith("ERROR no memory")
    assert len(log.error) == 200


@pytest.mark.parametrize("healthy", [True, False])
async def test_a_replica_answers_or_does_not(healthy: bool) -> None:
    replica = Replica(running=True, healthy=healthy, requests=3, tokens=8)
    with Web(replica.page).serving() as web:
        probe, url = Probe(), f"http://127.0.0.1:{web.port}"
        assert await probe.well(url) is healthy
        assert await probe.requests(url) == (3 if healthy else None)
        assert await probe.generated(url) == (8 if healthy else 0)
        await probe.close()


async def test_a_page_that_is_no_metrics() -> None:
    with Web(lambda _: (200, "vllm:num_requests_running{ oops")).serving() as web:
        probe = Probe()
        assert await probe.requests(f"http://127.0.0.1:{web.port}") is None
        await probe.close()
