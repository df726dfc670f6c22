"""The supervisor client and the readiness wait, on a real supervisord with tiny processes."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from example_stack import STACK
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from llmtrace.deploy import health
from llmtrace.deploy.supervisor import Process, Supervisor
from llmtrace.errors import UserError
from llmtrace.stack import Stack

CONF = """
[supervisord]
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
[unix_http_server]
file = {folder}/supervisor.sock
chmod = 0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[include]
files = {folder}/*.ini
"""


class Sandbox:
    """A supervisord of its own, in a folder with a short path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.supervisor = Supervisor(folder / "supervisor.sock")
        self.conf = folder / "supervisord.conf"
        self.conf.write_text(CONF.format(folder=folder))

    def program(
        self, name: str, code: str = "import time; time.sleep(600)", digest: str = "1", *, autostart: bool = True
    ) -> None:
        (self.folder / f"{name}.ini").write_text(
            f"[program:{name}]\n"
            f'command = {sys.executable} -c "{code}"\n'
            f'environment = DIGEST="{digest}"\n'
            f"stdout_logfile = {self.folder}/{name}.log\n"
            "redirect_stderr = true\nstartsecs = 0\nstartretries = 0\nautorestart = unexpected\n"
            f"autostart = {str(autostart).lower()}\n"
        )

    def processes(self) -> dict[str, Process]:
        return {process.name: process for process in self.supervisor.processes()}

    def wait_for(self, name: str, state: str, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while self.processes()[name].state != state:
            assert time.monotonic() < deadline, f"{name} is not {state} after {timeout_s} s"
            time.sleep(0.05)


@pytest.fixture
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("s"))
    yield sandbox
    sandbox.supervisor.shutdown(20)


def test_an_update_restarts_only_what_changed(sandbox: Sandbox) -> None:
    for name in ("same", "changed", "gone"):
        sandbox.program(name)
    sandbox.supervisor.launch(sandbox.conf)
    before = sandbox.processes()
    assert not sandbox.supervisor.update()

    sandbox.program("changed", digest="2")
    sandbox.program("new")
    (sandbox.folder / "gone.ini").unlink()
    pending = sandbox.supervisor.pending()
    update = sandbox.supervisor.update()

    assert pending == update
    assert (update.added, update.changed, update.removed) == (["new"], ["changed"], ["gone"])
    assert str(update) == "started new; restarted changed; stopped gone"
    after = sandbox.processes()
    assert set(after) == {"same", "changed", "new"}
    assert after["same"].pid == before["same"].pid
    assert after["changed"].pid != before["changed"].pid


def test_a_stopped_process_is_started_again(sandbox: Sandbox) -> None:
    sandbox.program("one")
    sandbox.supervisor.launch(sandbox.conf)
    sandbox.supervisor._call("stopProcess", "one")
    assert sandbox.supervisor.revive() == ["one"]
    assert sandbox.processes()["one"].pid


def test_a_process_without_autostart_rests_until_it_is_started(sandbox: Sandbox) -> None:
    sandbox.program("one")
    sandbox.program("spare", autostart=False)
    sandbox.supervisor.launch(sandbox.conf)
    assert sandbox.supervisor.revive() == []
    assert sandbox.processes()["spare"].state == "STOPPED"
    for _ in range(2):
        sandbox.supervisor.start("spare")
    assert sandbox.supervisor.process("spare").pid
    for _ in range(2):
        sandbox.supervisor.stop("spare")
    assert sandbox.supervisor.process("spare").state == "STOPPED"
    assert sandbox.supervisor.down() == []
    with pytest.raises(UserError, match="knows no process other"):
        sandbox.supervisor.start("other")


def test_shutdown_ends_every_process(sandbox: Sandbox) -> None:
    sandbox.program("one")
    sandbox.supervisor.launch(sandbox.conf)
    pids = [sandbox.supervisor.pid(), sandbox.processes()["one"].pid]
    assert sandbox.supervisor.shutdown(20)
    assert not any(pid and psutil.pid_exists(pid) for pid in pids)
    assert not sandbox.supervisor.shutdown(20)


def test_without_a_supervisor_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `llmtrace up`"):
        Supervisor(tmp_path / "none.sock").processes()


def test_a_refused_configuration_is_one_sentence(sandbox: Sandbox) -> None:
    (sandbox.folder / "bad.ini").write_text("[program:bad]\nstartsecs = soon\n")
    with pytest.raises(UserError, match="supervisord did not start") as error:
        sandbox.supervisor.launch(sandbox.conf)
    assert "\n" not in str(error.value)


@pytest.fixture
def answering() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def stack_with(sandbox: Sandbox, url: str) -> Stack:
    """A stack whose every component answers on ``url``; no pickers."""
    return Stack.model_validate(
        STACK
        | {"run_dir": sandbox.folder, "log_dir": sandbox.folder, "pickers": {}}
        | dict.fromkeys(("envoy_admin", "collector_health", "store", "prometheus"), url)
        | {"servers": [{"name": "vllm-0", "url": url, "process": "vllm-0"}]}
    )


NAMES = ("envoy", "vllm-0", "collector", "store", "prometheus")


def test_wait_ready_returns_when_everything_answers(sandbox: Sandbox, answering: str) -> None:
    for name in NAMES:
        sandbox.program(name)
    sandbox.supervisor.launch(sandbox.conf)
    stack = stack_with(sandbox, answering)
    assert set(health.wait_ready(stack, {}, 20)) == set(NAMES)
    assert all(status.ok for status in health.statuses(stack))


def test_wait_ready_shows_the_log_of_a_process_that_died(sandbox: Sandbox, answering: str) -> None:
    for name in NAMES:
        sandbox.program(name)
    sandbox.program("store", code="print('the disk is full'); raise SystemExit(0)")
    sandbox.supervisor.launch(sandbox.conf)
    sandbox.wait_for("store", "EXITED")
    stack = stack_with(sandbox, answering)
    with pytest.raises(UserError, match=r"(?s)store does not stay up \(EXITED\).*the disk is full"):
        health.wait_ready(stack, {}, 20)
    assert [status.component.name for status in health.statuses(stack) if not status.ok] == ["store"]


def test_wait_ready_says_what_it_waited_for(sandbox: Sandbox, answering: str) -> None:
    for name in NAMES:
        sandbox.program(name)
    sandbox.supervisor.launch(sandbox.conf)
    silent = stack_with(sandbox, answering).model_copy(update={"store": "http://127.0.0.1:1"})
    with pytest.raises(UserError, match=r"store did not answer on http://127.0.0.1:1/ready within"):
        health.wait_ready(silent, {"store": 1}, 20)


def test_wait_ready_does_not_show_what_an_earlier_process_wrote(sandbox: Sandbox, answering: str) -> None:
    for name in NAMES:
        sandbox.program(name)
    earlier = sandbox.folder / "store.log"
    earlier.write_text("shut down in good order\n")
    os.utime(earlier, (0, 0))
    sandbox.supervisor.launch(sandbox.conf)
    silent = stack_with(sandbox, answering).model_copy(update={"store": "http://127.0.0.1:1"})
    with pytest.raises(UserError, match=r"It has written nothing to \S+store.log in the") as raised:
        health.wait_ready(silent, {"store": 1}, 20)
    assert "in good order" not in str(raised.value)


@pytest.fixture
def with_picker(sandbox: Sandbox, answering: str) -> Iterator[Stack]:
    """A stack whose processes run, with a picker that says it is healthy; its metrics are the test's."""
    for name in (*NAMES, "picker"):
        sandbox.program(name)
    sandbox.supervisor.launch(sandbox.conf)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    picker = {"process": "picker", "grpc_port": port, "health_port": port, "metrics_port": 1, "config": "x"}
    stack = stack_with(sandbox, answering)
    yield Stack.model_validate(stack.model_dump() | {"pickers": {"only": picker}})
    server.stop(None)


@pytest.mark.parametrize("pages", [[0, 0, 1], [1]])
def test_wait_ready_returns_when_the_picker_sees_the_servers(with_picker: Stack, pages: list[int]) -> None:
    left = [*pages]
    answers = serve_metrics(lambda: f'llm_d_epp_ready_endpoints{{name="pool"}} {left.pop(0)}\n')
    with answers as port:
        health.wait_ready(on_metrics_port(with_picker, port), {}, 20)
    assert left == []


def test_wait_ready_says_which_picker_does_not_see_the_servers(with_picker: Stack) -> None:
    with (
        serve_metrics(lambda: 'llm_d_epp_ready_endpoints{name="pool"} 0\n') as port,
        pytest.raises(UserError, match="picker sees 0 of 1 model servers after 5 s"),
    ):
        health.wait_ready(on_metrics_port(with_picker, port), {}, 5)


def test_a_picker_whose_metrics_are_not_for_everybody_is_not_asked(with_picker: Stack) -> None:
    with serve_metrics(lambda: None) as port:
        assert "picker" in health.wait_ready(on_metrics_port(with_picker, port), {}, 20)


def on_metrics_port(stack: Stack, port: int) -> Stack:
    pickers = {arm: picker.model_copy(update={"metrics_port": port}) for arm, picker in stack.pickers.items()}
    return stack.model_copy(update={"pickers": pickers})


@contextmanager
def serve_metrics(page: Callable[[], str | None]) -> Iterator[int]:
    """Serve what ``page`` gives, 401 where it gives nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = page()
            self.send_response(401 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_statuses_of_a_stack_whose_supervisor_is_gone(tmp_path: Path) -> None:
    stack = Stack.model_validate(STACK | {"run_dir": tmp_path})
    assert not any(status.ok for status in health.statuses(stack))


def test_a_supervisord_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrace.deploy.supervisor.CALL_TIMEOUT_S", 0.2)
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(UserError, match="has not answered getAllProcessInfo"):
            Supervisor(path).processes()


def test_the_stack_sees_no_secrets_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    seen: dict[str, str] = {}

    def run(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess([], 1, "", "no")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="did not start"):
        Supervisor(tmp_path / "s.sock").launch(tmp_path / "conf")
    assert "PATH" in seen
    assert not {"OPENAI_API_KEY", "OTEL_SDK_DISABLED"} & set(seen)


def test_what_a_killed_supervisord_left_behind_is_stopped(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "s.sock")
    environment = {"SUPERVISOR_SERVER_URL": f"unix://{supervisor.socket}"}
    command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as left,
        subprocess.Popen(command, env={}, stdout=subprocess.PIPE) as other,
    ):
        try:
            for child in (left, other):
                assert child.stdout is not None
                child.stdout.readline()
            assert [process.pid for process in supervisor.orphans()] == [left.pid]
            assert supervisor.shutdown(10)
            assert left.poll() is not None
            assert other.poll() is None
            assert not supervisor.shutdown(10)
        finally:
            left.kill()
            other.kill()


def test_a_server_in_standby_is_not_waited_for_and_may_rest(sandbox: Sandbox, answering: str) -> None:
    for name in NAMES:
        sandbox.program(name, autostart=name != "vllm-0")
    sandbox.supervisor.launch(sandbox.conf)
    stack = stack_with(sandbox, answering)
    resting = stack.model_copy(update={"servers": [stack.servers[0].model_copy(update={"standby": True})]})
    took = health.wait_ready(resting, {}, 20)
    assert set(took) == set(NAMES) - {"vllm-0"}
    assert all(status.ok for status in health.statuses(resting))
    assert not all(status.ok for status in health.statuses(stack))
