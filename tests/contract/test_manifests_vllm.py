"""The command lines and variables of the manifests' model servers against the source of vLLM, and its parser.

The arguments of ``vllm serve``: https://docs.vllm.ai/en/latest/cli/serve/
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import program
from manifest_renders import rendered
from vllm_source import PINS, SourceUnavailableError, fetch, folder

from llmtrace.stack import cache_home
from manifests.checks.render import OVERLAYS, Object, containers, name_of, workloads

pytestmark = pytest.mark.timeout(300)  # a first fetch over a slow line
CACHE = cache_home()


@pytest.fixture(scope="session", params=PINS)
def vllm(request: pytest.FixtureRequest) -> Path:
    version: str = request.param
    if os.environ.get("LLMTRACE_OFFLINE") and not folder(version, CACHE).is_dir():
        pytest.skip(f"LLMTRACE_OFFLINE is set, and the source of vLLM {version} was not fetched before")
    try:
        return fetch(version, PINS[version], CACHE)
    except SourceUnavailableError as error:
        pytest.fail(f"{error} LLMTRACE_OFFLINE=1 skips what needs it.", pytrace=False)


def servers() -> Iterator[tuple[str, Object]]:
    """The containers that run vLLM, with their workload's name."""
    for overlay in OVERLAYS:
        for item, template in workloads(rendered(overlay)):
            for container, _ in containers(template):
                if container["name"] == "vllm":
                    yield f"{overlay}: {name_of(item)}", container


def arguments(container: Object) -> list[str]:
    """What follows ``vllm serve``, of a container that calls it or a shell that does."""
    if container["command"] == ["vllm", "serve"]:
        return list(container["args"])
    assert container["command"] == ["/bin/bash", "-c"]
    (script,) = container["args"]
    words = shlex.split(re.sub(r"\$\(\([^)]*\)\)", "1", script.replace("\\\n", " ")), comments=True)
    at = words.index("vllm")
    assert words[at - 1 : at + 2] == ["exec", "vllm", "serve"]
    return words[at + 2 :]


def flags_of(vllm: Path) -> set[str]:
    """The flags of ``vllm serve``; those of the front end come from its classes' fields."""
    files = [vllm / "engine" / "arg_utils.py", *vllm.glob("entrypoints/**/cli_args.py")]
    found: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found.add(f"--{field.target.id.replace('_', '-')}")
    return found


def literal(vllm: Path, file: str, name: str) -> set[str]:
    """The values of a ``Literal`` of vLLM."""
    for node in ast.walk(ast.parse((vllm / "config" / file).read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    raise AssertionError(f"{file} has no {name}")


def test_there_are_servers_of_every_scenario() -> None:
    assert len(list(servers())) == 6


def test_vllm_knows_every_flag(vllm: Path) -> None:
    known = flags_of(vllm)
    assert len(known) > 150
    for name, container in servers():
        given = arguments(container)
        flags = [argument.partition("=")[0] for argument in given if argument.startswith("-")]
        assert len(flags) > 5, name
        # One model, and nothing else without a flag.
        assert len([argument for argument in given if not argument.startswith("-")]) == 1, given
        positive = [flag.replace("--no-", "--", 1) for flag in flags]
        assert [flag for flag in positive if flag not in known] == [], name


def test_vllm_knows_the_back_ends_and_connectors(vllm: Path) -> None:
    all2all, moe = literal(vllm, "parallel.py", "All2AllBackend"), literal(vllm, "kernel.py", "MoEBackend")
    factory = (vllm / "distributed/kv_transfer/kv_connector/factory.py").read_text()
    fields = (vllm / "config" / "kv_transfer.py").read_text()
    seen: set[str] = set()
    for name, container in servers():
        for argument in arguments(container):
            flag, _, value = argument.partition("=")
            if flag == "--all2all-backend":
                assert value in all2all, name
            elif flag == "--moe-backend":
                assert value in moe, name
            elif flag == "--kv-transfer-config":
                config = json.loads(value)
                assert f'"{config["kv_connector"]}"' in factory
                assert f'"{config["kv_role"]}"' in fields
                assert all(re.search(rf"^    {field}:", fields, re.MULTILINE) for field in config)
            else:
                continue
            seen.add(f"{flag}={value}")
    assert {"--all2all-backend=deepep_low_latency", "--all2all-backend=deepep_high_throughput"} <= seen
    assert "--moe-backend=deep_gemm" in seen


def test_vllm_reads_every_variable(vllm: Path) -> None:
    known = (vllm / "envs.py").read_text()
    for name, container in servers():
        given = [variable["name"] for variable in container["env"] if variable["name"].startswith("VLLM_")]
        assert given
        assert [variable for variable in given if f'"{variable}"' not in known] == [], name


def test_the_supervisor_of_ranks_answers_the_probes(vllm: Path) -> None:
    source = (vllm / "entrypoints/launchers/dp_supervisor.py").read_text()
    for name, container in servers():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            if asked["port"] == "supervisor":
                assert f'@app.get("{asked["path"]}"' in source, name
                assert f"--data-parallel-supervisor-port={ports['supervisor']}" in arguments(container)
            else:
                assert f"--port={ports[asked['port']]}" in arguments(container), name


PARSES = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
serve = ServeSubcommand()
serve.subparser_init(parser.add_subparsers(dest="subparser"))
for given in json.load(sys.stdin):
    found = parser.parse_args(["serve", *given])
    serve.validate(found)
    print("parsed", found.model_tag, found.kv_transfer_config, found.data_parallel_size)
"""
"""What `vllm serve` does before it does anything else."""


def test_the_installed_vllm_parses_every_command_line() -> None:
    """As two nodes of eight ranks, of which this is the second."""
    node = {"$DP_SIZE_LOCAL": "8", "$LWS_LEADER_ADDRESS": "leader"}
    given = [
        [
            re.sub(r"\$[A-Z_]+", lambda found: node[found[0]], argument)
            .replace("--data-parallel-size=1", "--data-parallel-size=16")
            .replace("--data-parallel-start-rank=1", "--data-parallel-start-rank=8")
            for argument in arguments(container)
        ]
        for _, container in servers()
    ]
    done = subprocess.run(
        [program("vllm/*/bin/python"), "-c", PARSES],
        input=json.dumps(given),
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = [line for line in done.stdout.splitlines() if line.startswith("parsed ")]
    assert len(parsed) == len(given)
    assert sum("NixlConnector" in line for line in parsed) == 4
    assert sum(line.endswith(" 16") for line in parsed) == 2
