from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from llmtrace.deploy import doctor, playbook
from llmtrace.deploy.doctor import GIB, Facts, Holder, Port, Requirements
from llmtrace.errors import UserError

CACHE, STATE = Path("/cache"), Path("/state")
NEEDS = Requirements(
    ports=(Port(18080, "gateway random", "gateway_ports.random"), Port(13200, "trace store", "store_port")),
    memory=9 * GIB,
    disk={CACHE: 10 * GIB, STATE: 3 * GIB},
    cache_dir=CACHE,
    run_dir=STATE / "run",
)
GOOD = Facts(
    system="Linux",
    machine="x86_64",
    python=(3, 11),
    memory_available=12 * GIB,
    disk_free={CACHE: 20 * GIB, STATE: 20 * GIB},
)


def failures(needs: Requirements = NEEDS, **changes: Any) -> list[str]:
    facts = dataclasses.replace(GOOD, **changes)
    return [check.message for check in doctor.check(facts, needs) if not check.ok]


def test_a_good_machine_passes() -> None:
    assert failures() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"system": "Darwin", "machine": "arm64"}, ["Darwin arm64", "use a Linux machine"]),
        ({"machine": "riscv64"}, ["riscv64"]),
        ({"python": (3, 10)}, ["Python 3.10", "install Python 3.11"]),
        ({"memory_available": 4 * GIB}, ["9.0 GiB of memory", "4.0 GiB", "vllm_servers"]),
        (
            {"disk_free": {CACHE: 2 * GIB, STATE: 20 * GIB}},
            ["/cache", "10.0 GiB", "2.0 GiB", "XDG_CACHE_HOME"],
        ),
        (
            {"busy": {13200: Holder(77, "nginx")}},
            ["Port 13200", "trace store", "process 77 (nginx)", "change store_port"],
        ),
        ({"busy": {18080: Holder()}}, ["Port 18080", "another process", "change gateway_ports.random"]),
        (
            {"partial_installs": (CACHE / "vllm/0.32.0.partial",)},
            ["vllm 0.32.0", "interrupted", "run `llmtrace up`"],
        ),
    ],
)
def test_each_failure_is_one_sentence_with_its_remedy(changes: dict[str, Any], words: list[str]) -> None:
    (message,) = failures(**changes)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_the_running_stack_may_hold_its_ports_and_memory() -> None:
    busy = {13200: Holder(77, "python"), 18080: Holder(78, "envoy")}
    own = frozenset({70, 77, 78})
    assert failures(busy=busy, own_pids=own, memory_available=GIB) == []
    assert len(failures(busy={13200: Holder(99, "python")}, own_pids=own)) == 1


def test_one_port_for_two_uses_is_refused() -> None:
    needs = dataclasses.replace(NEEDS, ports=(*NEEDS.ports, Port(13200, "Prometheus server", "prometheus_port")))
    (message,) = failures(needs)
    assert "both the trace store and the Prometheus server" in message
    assert "prometheus_port" in message


def test_a_long_run_folder_is_refused() -> None:
    needs = dataclasses.replace(NEEDS, run_dir=Path("/" + "x" * 100))
    (message,) = failures(needs)
    assert "llmtrace_run_dir" in message


def test_gather_names_the_process_that_listens_and_the_half_finished_install(tmp_path: Path) -> None:
    (tmp_path / "vllm/0.32.0.partial").mkdir(parents=True)
    with socket.socket() as listener, socket.socket() as free:
        for sock in (listener, free):
            sock.bind(("127.0.0.1", 0))
        listener.listen()
        busy_port, free_port = listener.getsockname()[1], free.getsockname()[1]
        free.close()
        needs = Requirements(
            ports=(Port(busy_port, "a", "a_port"), Port(free_port, "b", "b_port")),
            memory=1,
            disk={tmp_path / "not/yet/there": 1},
            cache_dir=tmp_path,
            run_dir=tmp_path,
        )
        facts = doctor.gather(needs)
    assert set(facts.busy) == {busy_port}
    assert facts.busy[busy_port].pid == os.getpid()
    assert facts.partial_installs == (tmp_path / "vllm/0.32.0.partial",)
    assert facts.disk_free[tmp_path / "not/yet/there"] > 0
    assert not facts.running


@pytest.mark.parametrize(
    ("scenario", "count"),
    [
        ("prefix-cache", 2 + 6 + 3 + 7),
        ("pd-disaggregation", 3 + 9 + 3 + 2 + 3 + 7),
        ("wide-ep", 1 + 3 + 1 + 7),
        ("autoscaling", 1 + 3 + 3 + 8),
    ],
)
def test_the_default_inventory_has_every_port_once(scenario: str, count: int) -> None:
    variables = playbook.default_variables() | {"scenario": scenario}
    ports = doctor.ports_of(variables)
    assert len({port.number for port in ports}) == len(ports) == count
    written = {name for name in variables if name.endswith(("_port", "_ports"))}
    of_pd, of_autoscaling = {"sidecar_base_port", "vllm_side_channel_base_port"}, {"scaler_port"}
    unused = {
        "prefix-cache": of_pd | of_autoscaling,
        "pd-disaggregation": of_autoscaling,
        "wide-ep": of_pd | of_autoscaling,
        "autoscaling": of_pd,
    }
    assert {port.variable.split(".")[0] for port in ports} == written - unused[scenario]


@pytest.mark.parametrize("value", ["many", 0, 70000])
def test_a_port_that_is_none_is_named(value: object) -> None:
    variables = playbook.default_variables() | {"store_port": value}
    with pytest.raises(UserError, match="store_port"):
        doctor.ports_of(variables)


def test_gateways_of_another_form_are_named() -> None:
    variables = playbook.default_variables() | {"gateway_ports": {"random": 18081}}
    with pytest.raises(UserError, match=r"gateway_ports\.prefix-cache is None"):
        doctor.ports_of(variables)
