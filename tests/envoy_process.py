"""A real Envoy whose spans a test receives. Nothing is behind it: it answers 5xx, and there are its own spans only."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from deployed import program, render
from loopback import Receiver, free_ports, receiving, until

from bench.processes import process, wait
from llmtrace.traces.model import Span

SPANS_S = 20.0


@dataclass
class Gateway:
    """A running Envoy: its URL, and what receives its spans."""

    url: str
    receiver: Receiver

    def ask(self, headers: Mapping[str, str], caller: str = "127.0.0.1") -> Span:
        """Envoy's span of a request with these headers from the address ``caller``."""
        own = str(uuid.uuid4())
        with httpx.Client(transport=httpx.HTTPTransport(local_address=caller), timeout=30) as client:
            answer = client.get(f"{self.url}/v1/models", headers={"x-request-id": own, **headers})
        assert answer.is_server_error, answer

        def sent() -> Span | None:
            spans = (span for trace_id in self.receiver.trace_ids() for span in self.receiver.of(trace_id))
            return next((span for span in spans if is_of(span, own)), None)

        found: Span = until(sent, "Envoy's span", SPANS_S, poll_s=0.1)
        return found


def is_of(span: Span, request_id: str) -> bool:
    """Whether it is a request's; Envoy writes into the 15th place of the id that the request is traced."""
    found = str(span.attributes.get("guid:x-request-id", ""))
    return (found[:14], found[15:]) == (request_id[:14], request_id[15:])


@contextmanager
def envoy(folder: Path, configuration: Path, admin_port: int) -> Iterator[None]:
    """Run Envoy with its bootstrap until the block ends."""
    command = [program("envoy/*/envoy/_bin/envoy"), "--config-path", configuration, "--concurrency", "1"]
    log = folder / "envoy.log"
    flags = ["--log-level", "warning", "--disable-hot-restart"]
    with process([*map(str, command), *flags], log, {}) as child:
        wait(f"http://127.0.0.1:{admin_port}/ready", log, 20, child)
        yield


@contextmanager
def gateway(folder: Path, variables: Mapping[str, object]) -> Iterator[Gateway]:
    """Envoy as the playbook configures it with the default inventory changed by ``variables``."""
    admin, port, *picker = free_ports(5)
    with receiving() as receiver:
        own = {
            "gateway_ports": {"prefix-cache": {"random": port}},
            "picker_ports": {"prefix-cache": {"random": dict(zip(("grpc", "health", "metrics"), picker, strict=True))}},
            "envoy_admin_port": admin,
            "collector_otlp_grpc_port": receiver.port,
        }
        with envoy(folder, render(folder, own | dict(variables)) / "envoy.yaml", admin):
            yield Gateway(f"http://127.0.0.1:{port}", receiver)
