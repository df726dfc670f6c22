"""What a replica tells of itself: whether it is well, its requests, and how far its start has come."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

PROBE_TIMEOUT_S = 2.0
MOST_LOG_BYTES = 1 << 20
MOST_SAID = 200
LOADING = re.compile(rb"Initializing a V1 LLM engine|Starting to load model")
"""What vLLM's engine core logs when its imports are done and it begins with the model."""
LOADED = re.compile(rb"init engine \([^)]*\) took")
"""What it logs when the model is loaded, the KV cache is made, and the model is warm."""
_ERROR = re.compile(rb"(?:ERROR|Error|error:).*")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class StartLog:
    """Follows a log from its present end.

    ``loading`` and ``loaded`` say what it has shown, ``error`` its last error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = _size(path)
        self.loading = False
        self.loaded = False
        self.error = ""

    def read(self) -> None:
        """Take up what was written since the last time; a log that was begun anew is read from its start."""
        size = _size(self._path)
        if size < self._offset:
            self._offset = 0
        if size == self._offset:
            return
        try:
            with self._path.open("rb") as file:
                file.seek(max(self._offset, size - MOST_LOG_BYTES))
                text = file.read(MOST_LOG_BYTES)
        except OSError:
            return
        # A line that is not complete yet is read again.
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        self.loading = self.loading or LOADING.search(text) is not None
        self.loaded = self.loaded or LOADED.search(text) is not None
        if errors := _ERROR.findall(text):
            self.error = _COLOUR.sub("", errors[-1].decode(errors="replace")).strip()[:MOST_SAID]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Probe:
    """Asks replicas by HTTP."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def well(self, url: str) -> bool:
        """Whether the replica says that it can serve."""
        try:
            return (await self._client.get(f"{url}/health")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def requests(self, url: str) -> int | None:
        """Requests that run or wait on it; None where it does not tell."""
        totals = await self._totals(url, "vllm:num_requests_running", "vllm:num_requests_waiting")
        return None if totals is None else int(sum(totals))

    async def generated(self, url: str) -> float:
        """Tokens that it has generated; 0 where it does not tell."""
        totals = await self._totals(url, "vllm:generation_tokens_total")
        return totals[0] if totals else 0.0

    async def _totals(self, url: str, *names: str) -> list[float] | None:
        """The sums over the engines of these samples; None where the page cannot be had or has none of them."""
        try:
            response = await self._client.get(f"{url}/metrics")
            response.raise_for_status()
            lines = [line for line in response.text.splitlines() if line.startswith(names)]
            samples = [s for family in text_string_to_metric_families("\n".join([*lines, ""])) for s in family.samples]
        except (httpx.HTTPError, ValueError):
            return None
        if not samples:
            return None
        return [sum(s.value for s in samples if s.name == name) for name in names]
