"""Spans that a real Collector acknowledged arrive, whatever happens to the backend or to the Collector.

The backend is away for a minute from the gateway, for 8 s from the others; ``LLMTRACE_OUTAGE_S`` is one time for all.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from collecting import Backend, Collector, backend, collecting, documented, spans_of
from loopback import sample_sum, until

OUTAGES_S = {"local": 8.0, "agent": 8.0, "gateway": 60.0}
if "LLMTRACE_OUTAGE_S" in os.environ:
    OUTAGES_S = dict.fromkeys(OUTAGES_S, float(os.environ["LLMTRACE_OUTAGE_S"]))
SPANS = 20


class Load:
    """A client that sends requests of ``SPANS`` spans, ten a second, and notes which spans were acknowledged."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.acknowledged: set[bytes] = set()
        self.refused = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=5, trust_env=False) as client:
            while not self._over.wait(0.1):
                request = spans_of(*({} for _ in range(SPANS)))
                if self.collector.send(request, client):
                    self.acknowledged |= {s.span_id for s in request.resource_spans[0].scope_spans[0].spans}
                else:
                    self.refused += 1

    def finish(self) -> None:
        self._over.set()
        self._thread.join(10)


def arrived(store: Backend, load: Load, timeout_s: float = 40) -> int:
    """Wait until all that was acknowledged is there; the number of spans that came more than once."""
    until(lambda: load.acknowledged <= set(store.span_ids()), "every acknowledged span", timeout_s, poll_s=0.3)
    return sum(count > 1 for count in Counter(store.span_ids()).values())


@pytest.mark.parametrize("name", OUTAGES_S)
@pytest.mark.timeout(int(max(OUTAGES_S.values())) + 100)
def test_backend_down_under_load(name: str, tmp_path: Path) -> None:
    outage_s = OUTAGES_S[name]
    with backend() as store, collecting(name, tmp_path, store, {"SAMPLED_PERCENT": "100"}) as collector:
        load = Load(collector)
        until(lambda: store.spans(), "the first spans", 20)
        store.stop()
        before = len(load.acknowledged)
        over = time.monotonic() + outage_s
        until(lambda: time.monotonic() > over, "the end of the outage", outage_s + 5, poll_s=0.5)
        assert sample_sum(collector.page(), "otelcol_exporter_queue_size") > 0
        assert len(load.acknowledged) >= before + SPANS * outage_s
        store.start()
        load.finish()
        assert load.refused == 0
        assert arrived(store, load) == 0


@pytest.mark.parametrize(
    ("name", "more"), [("local", ""), ("agent", ""), ("gateway", documented("Every trace, without sampling"))]
)
def test_collector_killed_while_the_backend_is_down(name: str, more: str, tmp_path: Path) -> None:
    """The gateway without its sampling: what waits for its decision is in memory only."""
    with backend() as store, collecting(name, tmp_path, store, more=more) as collector:
        load = Load(collector)
        until(lambda: store.spans(), "the first spans", 20)
        store.stop()
        for _ in range(2):
            before = len(load.acknowledged)
            until(lambda seen=before: len(load.acknowledged) > seen + 10 * SPANS, "load", 20)  # type: ignore[misc]
            collector.kill()
            collector.start()
        store.start()
        load.finish()
        arrived(store, load)
        assert len(load.acknowledged) > 20 * SPANS


@pytest.mark.parametrize("name", ["local", "agent"])
def test_collector_killed_while_it_sends(name: str, tmp_path: Path) -> None:
    with backend() as store, collecting(name, tmp_path, store) as collector:
        load = Load(collector)
        for _ in range(3):
            before = len(load.acknowledged)
            until(lambda seen=before: len(load.acknowledged) > seen + 5 * SPANS, "load", 20)  # type: ignore[misc]
            collector.kill()
            collector.start()
        load.finish()
        twice = arrived(store, load)
        print(
            f"{name}: {len(load.acknowledged)} spans acknowledged, {twice} came twice, {load.refused} requests refused"
        )


def test_gateway_is_replaced_under_load(tmp_path: Path) -> None:
    """An agent and its gateway: the gateway is stopped and started, and nothing is lost on the way through both."""
    folders = [tmp_path / name for name in ("agent", "gateway")]
    for folder in folders:
        folder.mkdir()
    with backend() as store, collecting("gateway", folders[1], store, {"SAMPLED_PERCENT": "100"}) as gateway:
        to_it = {"GATEWAY_ENDPOINT": f"127.0.0.1:{gateway.grpc_port}"}
        with collecting("agent", folders[0], store, to_it) as agent:
            load = Load(agent)
            until(lambda: store.spans(), "the first spans", 20)
            for _ in range(2):
                gateway.stop()
                before = len(load.acknowledged)
                until(lambda seen=before: len(load.acknowledged) > seen + 10 * SPANS, "load", 20)  # type: ignore[misc]
                gateway.start()
            load.finish()
            assert load.refused == 0
            arrived(store, load)


@pytest.mark.parametrize("name", ["local", "agent"])
def test_a_full_queue_refuses_instead_of_losing(name: str, tmp_path: Path) -> None:
    with backend() as store, collecting(name, tmp_path, store, {"QUEUE_BYTES": "60000"}) as collector:
        store.stop()
        load = Load(collector)
        until(lambda: load.refused > 3, "refusals", 30)
        assert sample_sum(collector.page(), "otelcol_exporter_enqueue_failed_spans_total") >= 3 * SPANS
        store.start()
        load.finish()
        arrived(store, load)


@pytest.mark.parametrize("name", ["local", "agent", "gateway"])
def test_over_the_memory_limit_spans_are_refused(name: str, tmp_path: Path) -> None:
    """The limit less the spike is below what the Collector needs for itself."""
    variables = {"MEMORY_LIMIT_MIB": "30", "MEMORY_SPIKE_MIB": "25"}
    with backend() as store, collecting(name, tmp_path, store, variables) as collector:
        until(lambda: not collector.send(spans_of({})), "a refusal", 20)
        before = sample_sum(collector.page(), "otelcol_receiver_refused_spans_total")
        assert not collector.send(spans_of(*({} for _ in range(SPANS))))
        assert sample_sum(collector.page(), "otelcol_receiver_refused_spans_total") == before + SPANS
