"""The running local stack, by its state file."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from llmtrace.deploy import health, playbook
from llmtrace.deploy.supervisor import Supervisor
from llmtrace.stack import Stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack.load()


def family(stack: Stack) -> list[psutil.Process]:
    """Supervisord and all processes below it."""
    pid = Supervisor(stack.supervisor_socket).pid()
    assert pid
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def chat(stack: Stack, arm: str, traceparent: str | None = None) -> httpx.Response:
    return httpx.post(
        f"{stack.gateways[arm]}/v1/chat/completions",
        json={
            "model": stack.model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 16,
        },
        headers={"traceparent": traceparent} if traceparent else {},
        timeout=60,
    )


def test_every_component_answers(stack: Stack) -> None:
    assert [status for status in health.statuses(stack) if not status.ok] == []


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    listening = [
        (process.name(), connection.laddr)
        for process in family(stack)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 15
    # gRPC's sockets show IPv4 loopback as a mapped IPv6 address.
    addresses = {ipaddress.ip_address(address.ip.removeprefix("::ffff:")) for _, address in listening}
    assert all(address.is_loopback for address in addresses), listening


def test_the_stack_fits_its_memory(stack: Stack) -> None:
    total = sum(process.memory_full_info().pss for process in family(stack))
    assert total < 12 * 2**30


@pytest.mark.parametrize("arm", ["prefix-aware", "random"])
def test_the_model_answers_through_the_gateway(stack: Stack, arm: str) -> None:
    response = chat(stack, arm)
    assert response.status_code == 200, response.text
    answer = response.json()
    # What a small model says in bfloat16 depends on the processor; the template's tokens do not.
    assert answer["usage"]["prompt_tokens"] == 37
    assert answer["choices"][0]["message"]["content"].strip()
    assert response.headers["x-request-id"]


def test_a_client_cannot_choose_the_destination(stack: Stack) -> None:
    response = httpx.get(
        f"{stack.gateways['random']}/v1/models",
        headers={"x-gateway-destination-endpoint": stack.envoy_admin.removeprefix("http://")},
        timeout=30,
    )
    assert response.json()["data"][0]["id"] == stack.model


def test_the_access_log_has_the_trace_id_and_no_text(stack: Stack) -> None:
    trace_id = f"{time.time_ns():032x}"
    chat(stack, "random", f"00-{trace_id}-00000000000000aa-01").raise_for_status()
    deadline = time.monotonic() + 20
    while trace_id not in (log := (stack.log_dir / "envoy.log").read_text()):
        assert time.monotonic() < deadline, "the access log has no line with the trace id after 20 s"
        time.sleep(0.2)
    assert "capital of France" not in log


def test_prometheus_scrapes_every_component(stack: Stack) -> None:
    targets = httpx.get(f"{stack.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert [(t["labels"], t["lastError"]) for t in targets if t["health"] != "up"] == []
    assert len(targets) == len(stack.servers) + len(stack.pickers) + 2


def test_span_metrics_carry_exemplars_of_the_model_servers(stack: Stack) -> None:
    chat(stack, "random").raise_for_status()
    query = 'llmtrace_span_duration_seconds_bucket{service_name="vllm",span_name="llm_request"}'
    deadline = time.monotonic() + 40
    while True:
        answer = httpx.get(f"{stack.prometheus}/api/v1/query_exemplars", params={"query": query}).json()
        if any("trace_id" in e["labels"] for series in answer["data"] for e in series["exemplars"]):
            return
        assert time.monotonic() < deadline, "no exemplar of llm_request in Prometheus after 40 s"
        time.sleep(1)


def test_a_second_run_changes_nothing(stack: Stack) -> None:
    before = {process.pid for process in family(stack)}
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", playbook.playbooks_dir() / "site.yml"],
        env=os.environ | {"ANSIBLE_CONFIG": str(playbook.CHECKOUT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout.splitlines()[-1]
    assert {process.pid for process in family(stack)} == before
