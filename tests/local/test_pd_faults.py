"""The real P/D stack while parts of it die under a request.

Each client gets an answer of llm-d's or a completed one, never a hang; the trace has its error on the span of what
failed; the stack recovers by itself. Servers, sidecars, pickers and Envoy are the running stack's, and supervisord
starts again what a test kills.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import httpx
import psutil
import pytest
from engine_servers import in_trace, new_trace_id
from loopback import free_port, sample_sum, until
from stored import trace_of

from bench.processes import process
from llmtrace.deploy import health
from llmtrace.deploy.supervisor import Supervisor
from llmtrace.semconv import attributes as names
from llmtrace.stack import Server, Stack
from llmtrace.traces.model import Span, Trace

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

CLIENT_S = 60.0
"""A client that waits longer has been left hanging."""
RECOVERY_S = 300.0
ALWAYS, NEVER = "always-split", "never-split"
PREFILL = "prefill-0"
DECODERS = ("decode-0", "decode-1")
SIDECAR = names.SIDECAR_SERVICE
SIDECAR_SPAN = f"{names.SIDECAR_SPAN_PREFIX}POST /v1/chat/completions"
LONG = 2_500
"""Prompt tokens of which a server needs more than a second for the prefill."""
SHORT = 300


class Outcome(NamedTuple):
    """What a client got; a stream is ``complete`` if it said so itself."""

    status: int
    complete: bool
    text: str


class Client:
    """Sends chat requests to a gateway or to a sidecar, each in a trace of its own."""

    def __init__(self, stack: Stack, pool: ThreadPoolExecutor) -> None:
        self._model = stack.model
        self._pool = pool
        self._asked = time.time_ns()

    def ask(
        self, url: str, *, tokens: int, answer: int = 4, stream: bool = False, prefill: str = ""
    ) -> tuple[str, Future[Outcome]]:
        """Trace id and coming outcome of a request with a prompt that no server has seen."""
        trace_id = new_trace_id()
        self._asked += 1
        # Four tokens a word, one for each digit and the space.
        words = [f"{number:03d}" for number in range(tokens // 4)]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"{self._asked} {' '.join(words)}"}],
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        headers = in_trace(trace_id) | ({names.PREFILLER_HEADER: prefill} if prefill else {})
        return trace_id, self._pool.submit(self._send, f"{url}/v1/chat/completions", body, headers)

    def _send(self, url: str, body: dict[str, object], headers: dict[str, str]) -> Outcome:
        text, status = "", 0
        try:
            with httpx.stream("POST", url, json=body, headers=headers, timeout=CLIENT_S, trust_env=False) as response:
                status = response.status_code
                for part in response.iter_text():
                    text += part
        except httpx.RemoteProtocolError:
            return Outcome(status, complete=False, text=text)
        return Outcome(status, complete="[DONE]" in text if body["stream"] else True, text=text)


@pytest.fixture(scope="module")
def client(pd_stack: Stack) -> Iterator[Client]:
    with ThreadPoolExecutor(8) as pool:
        yield Client(pd_stack, pool)


def server(stack: Stack, name: str) -> Server:
    return next(each for each in stack.servers if each.name == name)


def sidecar_url(stack: Stack, decoder: str) -> str:
    return next(each.url for each in stack.sidecars if each.process == f"sidecar-{decoder}")


def address(url: str) -> str:
    return url.removeprefix("http://")


def metric(stack: Stack, name: str, metric: str) -> float:
    """A server's sample of vLLM's metric ``metric``."""
    page = httpx.get(f"{server(stack, name).url}/metrics", timeout=30, trust_env=False).text
    return sample_sum(page, f"vllm:{metric}")


def family(stack: Stack, name: str) -> list[psutil.Process]:
    """A supervised process and all below it."""
    (pid,) = [each.pid for each in Supervisor(stack.supervisor_socket).processes() if each.name == name]
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def kill(stack: Stack, name: str) -> None:
    """End it at once, with all its processes."""
    for each in family(stack, name):
        each.kill()


@contextmanager
def suspended(stack: Stack, *supervised: str) -> Iterator[None]:
    found = [each for name in supervised for each in family(stack, name)]
    for each in found:
        each.suspend()
    try:
        yield
    finally:
        for each in found:
            each.resume()


def serving_decoder(stack: Stack) -> str:
    """The decode server that has a request."""

    def running() -> list[str]:
        return [name for name in DECODERS if metric(stack, name, "num_requests_running")]

    found: list[str] = until(running, "a decode server that runs the request", CLIENT_S)
    return found[0]


def one(trace: Trace, service: str, name: str) -> Span:
    (span,) = [span for span in trace.spans if (span.service, span.name) == (service, name)]
    return span


def sidecar(trace: Trace, name: str) -> Span:
    return one(trace, SIDECAR, name)


def failed_calls(trace: Trace, leg: Span) -> list[Span]:
    """Calls below a leg that failed."""
    return [span for span in trace.children(leg) if span.status == "ERROR"]


@pytest.fixture(autouse=True)
def _recovers(pd_stack: Stack, client: Client) -> Iterator[None]:
    """After each test, wait until every component answers, and split a request at each decode server."""
    yield
    until(lambda: all(status.ok for status in health.statuses(pd_stack)), "the stack's recovery", RECOVERY_S, poll_s=1)
    prefill = address(server(pd_stack, PREFILL).url)
    for name in DECODERS:
        trace_id, answer = client.ask(sidecar_url(pd_stack, name), tokens=SHORT, prefill=prefill)
        assert answer.result(CLIENT_S).status == httpx.codes.OK
        trace = trace_of(pd_stack, trace_id, ("vllm", names.KV_LOAD_SPAN))
        assert one(trace, "vllm", names.KV_LOAD_SPAN).attributes[names.KV_LOAD_FAILED] is False


def test_sidecar_that_is_restarted_finishes_its_requests(pd_stack: Stack, client: Client) -> None:
    trace_id, answer = client.ask(pd_stack.gateways[ALWAYS], tokens=SHORT, answer=40, stream=True)
    name = serving_decoder(pd_stack)
    Supervisor(pd_stack.supervisor_socket).restart(f"sidecar-{name}")
    outcome = answer.result(CLIENT_S)
    assert (outcome.status, outcome.complete) == (200, True), outcome.text[-500:]
    trace = trace_of(pd_stack, trace_id, (SIDECAR, SIDECAR_SPAN))
    assert {sidecar(trace, span).status for span in (SIDECAR_SPAN, names.FORWARD_SPAN)} == {"UNSET"}


def test_sidecar_killed_while_it_streams(pd_stack: Stack, client: Client) -> None:
    trace_id, answer = client.ask(pd_stack.gateways[ALWAYS], tokens=SHORT, answer=400, stream=True)
    name = serving_decoder(pd_stack)
    kill(pd_stack, f"sidecar-{name}")
    outcome = answer.result(CLIENT_S)
    assert not outcome.complete
    # The killed sidecar's spans are lost; Envoy and the model server, which saw it go, tell what happened.
    trace = trace_of(pd_stack, trace_id, ("envoy", "ingress"), ("vllm", names.SERVER_SPAN))
    assert one(trace, "envoy", "ingress").attributes["response_flags"] == "UPE"


def test_prefill_server_that_tells_a_wrong_side_channel_host(pd_stack: Stack, client: Client, tmp_path: Path) -> None:
    """As one does whose VLLM_NIXL_SIDE_CHANNEL_HOST was left out: the decode server looks for it at a wrong address."""
    with misadvertised(server(pd_stack, PREFILL).url) as prefill, own_sidecar(pd_stack, "decode-1", tmp_path) as url:
        trace_id, answer = client.ask(url, tokens=LONG, prefill=prefill)
        outcome = answer.result(CLIENT_S)
    trace = trace_of(pd_stack, trace_id, (SIDECAR, SIDECAR_SPAN), ("vllm", names.KV_LOAD_SPAN))
    check_failed_load(trace, outcome)


def test_prefill_server_killed_while_it_prefills(pd_stack: Stack, client: Client) -> None:
    trace_id, answer = client.ask(pd_stack.gateways[ALWAYS], tokens=LONG)
    until(lambda: metric(pd_stack, PREFILL, "num_requests_running"), "the prefill leg", CLIENT_S)
    kill(pd_stack, PREFILL)
    outcome = answer.result(CLIENT_S)
    assert outcome.status == httpx.codes.BAD_GATEWAY, outcome
    assert json.loads(outcome.text)["type"] == "BadGateway"
    trace = trace_of(pd_stack, trace_id, (SIDECAR, SIDECAR_SPAN), ("envoy", "ingress"))
    leg = sidecar(trace, names.PD_PREFILL_SPAN)
    assert (leg.status, len(failed_calls(trace, leg))) == ("ERROR", 1)
    assert {sidecar(trace, span).status for span in (SIDECAR_SPAN, names.FORWARD_SPAN)} == {"ERROR"}
    assert [span for span in trace.spans if span.service == SIDECAR and span.name == names.PD_DECODE_SPAN] == []
    assert trace.named(names.SERVER_SPAN) == []
    # While it is away, nobody waits either.
    _, next_answer = client.ask(pd_stack.gateways[ALWAYS], tokens=SHORT)
    assert next_answer.result(CLIENT_S).status in {200, 502, 503}
    _, unified = client.ask(pd_stack.gateways[NEVER], tokens=SHORT)
    assert unified.result(CLIENT_S).status == httpx.codes.OK


def test_prefill_server_killed_between_the_legs_and_decode_server_killed(pd_stack: Stack, client: Client) -> None:
    """One decode server knows the prefill server's NIXL agent and reads from it; the other has yet to find it."""
    prefill = address(server(pd_stack, PREFILL).url)
    before = metric(pd_stack, PREFILL, "request_success_total")
    with suspended(pd_stack, *DECODERS):
        asked = [client.ask(sidecar_url(pd_stack, name), tokens=LONG, prefill=prefill) for name in DECODERS]
        until(
            lambda: metric(pd_stack, PREFILL, "request_success_total") == before + len(asked),
            "both prefill legs' ends",
            CLIENT_S,
            poll_s=0.2,
        )
        kill(pd_stack, PREFILL)
    for trace_id, answer in asked:
        outcome = answer.result(CLIENT_S)
        trace = trace_of(pd_stack, trace_id, (SIDECAR, SIDECAR_SPAN), ("vllm", names.KV_LOAD_SPAN))
        check_failed_load(trace, outcome)

    trace_id, streamed = client.ask(pd_stack.gateways[NEVER], tokens=SHORT, answer=400, stream=True)
    name = serving_decoder(pd_stack)
    kill(pd_stack, name)
    outcome = streamed.result(CLIENT_S)
    assert not outcome.complete
    trace = trace_of(pd_stack, trace_id, (SIDECAR, SIDECAR_SPAN), ("envoy", "ingress"))
    forward = sidecar(trace, names.FORWARD_SPAN)
    assert (forward.status, len(failed_calls(trace, forward))) == ("ERROR", 1)
    assert sidecar(trace, SIDECAR_SPAN).status == "ERROR"
    assert trace.named(names.SERVER_SPAN) == []
    _, refused = client.ask(sidecar_url(pd_stack, name), tokens=SHORT)
    outcome = refused.result(CLIENT_S)
    assert outcome.status == httpx.codes.SERVICE_UNAVAILABLE
    assert "decode node is not ready" in outcome.text


def check_failed_load(trace: Trace, outcome: Outcome) -> None:
    """The prefill leg went well, the KV did not come, and the decode server's policy is to fail the request."""
    assert outcome.status == httpx.codes.INTERNAL_SERVER_ERROR, outcome
    assert sidecar(trace, names.PD_PREFILL_SPAN).status == "UNSET"
    leg = sidecar(trace, names.PD_DECODE_SPAN)
    assert (leg.status, len(failed_calls(trace, leg))) == ("ERROR", 1)
    assert {sidecar(trace, span).status for span in (SIDECAR_SPAN, names.FORWARD_SPAN)} == {"ERROR"}
    load = one(trace, "vllm", names.KV_LOAD_SPAN)
    assert (load.status, load.attributes[names.KV_LOAD_FAILED]) == ("ERROR", True)


@contextmanager
def misadvertised(url: str) -> Iterator[str]:
    """Address of a proxy before the prefill server that names a side channel at which nobody listens."""
    port = free_port()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["content-length"]))
            headers = {name: self.headers[name] for name in ("content-type", "traceparent", "x-request-id")}
            answer = httpx.post(f"{url}{self.path}", content=asked, headers=headers, timeout=CLIENT_S, trust_env=False)
            told = answer.json()
            # A name that is new to the decode server: of an engine that it knows it does not ask the address again.
            told["kv_transfer_params"] |= {
                "remote_host": "127.0.0.1",
                "remote_port": port,
                "remote_engine_id": new_trace_id(),
            }
            body = json.dumps(told).encode()
            self.send_response(answer.status_code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
            thread.join()


@contextmanager
def own_sidecar(stack: Stack, decoder: str, folder: Path) -> Iterator[str]:
    """URL of a sidecar before a decode server, like the stack's, but without its list of prefill servers."""
    port, target = free_port(), server(stack, decoder).url.rpartition(":")[2]
    command = [sys.executable, "-m", "llmtrace.sidecar", f"--port={port}", f"--model-server-port={target}"]
    environment = {
        "OTEL_SERVICE_NAME": SIDECAR,
        "OTEL_RESOURCE_ATTRIBUTES": f"service.instance.id={decoder}",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.collector_otlp_grpc,
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "1.0",
    }
    log, url = folder / "sidecar.log", f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert sidecar.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health", trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    with process([*command, "--kv-connector=nixlv2", "--secure-proxy=false", "--tracing"], log, environment) as sidecar:
        until(ready, "the sidecar's start", 30)
        yield url
