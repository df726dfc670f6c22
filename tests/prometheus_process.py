"""A Prometheus of its own for a test: the one that the stack installed, with the stack's settings for OTLP."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from deployed import program
from loopback import free_port, until

CONFIGURATION = """\
global: {scrape_interval: 5s}
storage:
  tsdb: {out_of_order_time_window: 1h}
otlp:
  promote_resource_attributes: [service.name, service.instance.id, llmtrace.role, k8s.namespace.name]
  translation_strategy: UnderscoreEscapingWithSuffixes
"""


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool; the test is skipped where it is not installed."""
    command = [program("prometheus/*/promtool"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def prometheus(folder: Path, settings: str = CONFIGURATION) -> Iterator[httpx.Client]:
    """A client of a running Prometheus whose data is in ``folder``; the test is skipped where it is not installed."""
    binary = program("prometheus/*/prometheus")
    port = free_port()
    configuration = folder / "prometheus.yaml"
    configuration.write_text(settings)
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-otlp-receiver",
            "--enable-feature=exemplar-storage,created-timestamp-zero-ingestion",
            "--log.level=error",
        ]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:

            def ready() -> bool:
                try:
                    return client.get("/-/ready").status_code == httpx.codes.OK
                except httpx.TransportError:
                    return process.poll() is not None

            until(ready, "Prometheus to be ready", 30)
            assert process.poll() is None, "Prometheus ended"
            yield client
    finally:
        process.terminate()
        process.wait(20)
