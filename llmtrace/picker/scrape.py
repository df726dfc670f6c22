"""Scrapes the model servers' metrics into the pool, as llm-d's metrics-data-source does."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from llmtrace.picker.endpoints import Endpoint, Load, Pool

WAITING = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"
_PREFIXES = (WAITING, RUNNING, KV_CACHE_USAGE, CACHE_CONFIG)
MAX_BYTES = 8 << 20
TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


def parse(text: str) -> Load:
    """Load from a page of metrics; what the page lacks is 0. Raises ValueError where it is no metrics page.

    A server with several engines reports one sample for each: requests add up, KV cache usage is the mean.
    """
    lines = [line for line in text.splitlines() if line.startswith(_PREFIXES)]
    load = Load()
    usage: list[float] = []
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            if not math.isfinite(sample.value):
                continue
            if sample.name == WAITING:
                load.waiting += int(sample.value)
                load.waiting_known = True
            elif sample.name == RUNNING:
                load.running += int(sample.value)
            elif sample.name == KV_CACHE_USAGE:
                usage.append(sample.value)
            elif sample.name == CACHE_CONFIG:
                load.block_size = _integer(sample.labels.get("block_size"))
                load.num_blocks += _integer(sample.labels.get("num_gpu_blocks"))
    if usage:
        load.kv_cache_usage = min(max(sum(usage) / len(usage), 0.0), 1.0)
    return load


def _integer(value: str | None) -> int:
    return int(value) if value and value.isdigit() else 0


class Scraper:
    """Keeps the load of every endpoint up to date, ``interval_s`` seconds between two scrapes of one."""

    def __init__(self, pool: Pool, interval_s: float) -> None:
        self._pool = pool
        self._interval_s = interval_s
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
        self._failing: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Scrape until cancelled. A server that takes long to answer keeps no other one waiting."""
        try:
            while True:
                for endpoint in self._pool:
                    running = self._running.get(endpoint.id)
                    if running is None or running.done():
                        self._running[endpoint.id] = asyncio.create_task(self._scrape(endpoint))
                await asyncio.sleep(self._interval_s)
                known = {endpoint.id for endpoint in self._pool}
                self._running = {id_: task for id_, task in self._running.items() if id_ in known or not task.done()}
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            await self._client.aclose()

    async def once(self, endpoints: Iterable[Endpoint]) -> None:
        """Scrape every endpoint once, side by side."""
        await asyncio.gather(*(self._scrape(endpoint) for endpoint in endpoints))

    async def _scrape(self, endpoint: Endpoint) -> None:
        try:
            response = await self._client.get(f"http://{endpoint.address}/metrics")
            # Any answer shows that the server serves; only a good one tells its load.
            endpoint.answered_at = time.monotonic()
            if response.status_code == httpx.codes.OK and len(response.content) <= MAX_BYTES:
                endpoint.load = parse(response.text)
            self._recovered(endpoint)
        except httpx.ConnectError as error:
            endpoint.answered_at = None
            self._failed(endpoint, error)
        except (httpx.HTTPError, ValueError, OverflowError) as error:
            self._failed(endpoint, error)

    def _failed(self, endpoint: Endpoint, error: Exception) -> None:
        if endpoint.id not in self._failing:
            self._failing.add(endpoint.id)
            reason = str(error) or type(error).__name__
            _log.warning("endpoint %s (%s) answers no scrape: %s", endpoint.id, endpoint.address, reason)

    def _recovered(self, endpoint: Endpoint) -> None:
        if endpoint.id in self._failing:
            self._failing.discard(endpoint.id)
            _log.info("endpoint %s (%s) answers again", endpoint.id, endpoint.address)
