"""A metric on its way to a HorizontalPodAutoscaler: Prometheus, and an adapter of the external metrics API."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from kubernetes_load import QUEUE
from loopback import until
from prometheus_process import prometheus

GROUP = "external.metrics.k8s.io/v1beta1"

Object = dict[str, Any]


class Adapter:
    """The external metrics API: of each metric its query's value, which Prometheus says.

    In place of KEDA's: of the API it has what the HPA controller asks for. ``asked`` is when it was asked for a value,
    in seconds since the epoch.
    """

    def __init__(self, certificate: Path, key: Path, client: httpx.Client, queries: Mapping[str, str]) -> None:
        self.asked: list[float] = []
        self._prometheus, self._queries = client, queries
        adapter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = adapter.answer(self.path)
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def answer(self, address: str) -> tuple[int, Object]:
        names = urlsplit(address).path.removeprefix(f"/apis/{GROUP}").strip("/").split("/")
        if len(names) != 3:
            return 200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP, "resources": []}
        self.asked.append(time.time())
        try:
            answer = self._prometheus.get("/api/v1/query", params={"query": self._queries[names[2]]})
            found = [float(series["value"][1]) for series in answer.raise_for_status().json()["data"]["result"]]
        except httpx.HTTPError as error:
            return 503, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(error), "code": 503}
        now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        about = {"metricName": names[2], "metricLabels": {}, "timestamp": now}
        items = [about | {"value": f"{round(value * 1000)}m"} for value in found]
        return 200, {"kind": "ExternalMetricValueList", "apiVersion": GROUP, "metadata": {}, "items": items}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def prometheus_of(port: int, folder: Path) -> Iterator[httpx.Client]:
    """A client of a Prometheus that looks at this port once a second, once it has."""
    folder.mkdir()
    configuration = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "picker", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    with prometheus(folder, json.dumps(configuration)) as client:
        until(
            lambda: client.get("/api/v1/query", params={"query": QUEUE}).json()["data"]["result"], "a first sample", 30
        )
        yield client
