"""What the roles render, judged by the programs that read it."""

from __future__ import annotations

import configparser
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from collecting import FLAGS, RENDERINGS
from deployed import program, refusal, render
from picking import Handle
from supervisor.options import ServerOptions

from llmtrace.autoscale.__main__ import options
from llmtrace.engine.steps import ids
from llmtrace.picker import config

CHANGED = {"vllm_servers": 2, "vllm_base_port": 18500, "vllm_block_size": 64, "store_port": 18501}


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("state"), CHANGED)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def run(*command: object, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def environment_of(etc: Path, process: str) -> dict[str, str]:
    section = program_section(etc, process)
    pairs = (part.split("=", 1) for part in section["environment"].split('",'))
    return {name: value.strip('"') for name, value in pairs}


def program_section(etc: Path, process: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser()
    parser.read(etc / f"supervisor.d/{process}.ini")
    return parser[f"program:{process}"]


def test_envoy_accepts_its_bootstrap(etc: Path) -> None:
    run(program("envoy/*/envoy/_bin/envoy"), "--mode", "validate", "--config-path", etc / "envoy.yaml")


def test_promtool_accepts_prometheus_configuration(etc: Path) -> None:
    run(program("prometheus/*/promtool"), "check", "config", etc / "prometheus.yaml")


def test_the_collector_accepts_its_configuration(etc: Path) -> None:
    command = shlex.split(program_section(etc, "collector")["command"])
    configs = [f"--config={etc}/collector-{name}.yaml" for name in RENDERINGS["local"]]
    assert command[1:] == [*FLAGS, *configs]
    run(program("collector/*/otelcol"), "validate", *command[1:], env=environment_of(etc, "collector"))


def test_texts_pass_the_collector_only_if_asked_for(tmp_path: Path) -> None:
    etc = render(tmp_path, {"capture_content": True})
    command = program_section(etc, "collector")["command"]
    assert f"collector-redaction.yaml --config={etc}/collector-capture-content.yaml" in command


def test_model_servers_say_their_role_and_model(disaggregated: Path) -> None:
    for name, role in (("prefill-0", "prefill"), ("decode-1", "decode")):
        said = environment_of(disaggregated, name)["OTEL_RESOURCE_ATTRIBUTES"]
        assert said == f"service.instance.id={name},llmtrace.role={role},gen_ai.request.model=smollm2-135m"
    promoted = read(disaggregated / "prometheus.yaml")["otlp"]["promote_resource_attributes"]
    assert {"llmtrace.role", "k8s.namespace.name"} <= {*promoted}


def test_supervisord_accepts_its_configuration(etc: Path) -> None:
    options = ServerOptions()
    options.realize(["-c", str(etc / "supervisord.conf")])
    names = {group.name for group in options.process_group_configs}
    assert names == {
        *("envoy", "collector", "prometheus", "store"),
        *("picker-prefix-aware", "picker-random", "vllm-0", "vllm-1"),
    }


@pytest.fixture(scope="module")
def disaggregated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other scenario, rendered over the first one's files."""
    home = tmp_path_factory.mktemp("state")
    render(home, CHANGED)
    return render(home, {"scenario": "pd-disaggregation", "pd_threshold_tokens": 300})


def test_another_scenario_has_its_own_processes(disaggregated: Path) -> None:
    options = ServerOptions()
    options.realize(["-c", str(disaggregated / "supervisord.conf")])
    assert {group.name for group in options.process_group_configs} == {
        *("envoy", "collector", "prometheus", "store"),
        *("picker-by-threshold", "picker-always-split", "picker-never-split"),
        *("prefill-0", "decode-0", "decode-1", "sidecar-decode-0", "sidecar-decode-1"),
    }
    run(program("envoy/*/envoy/_bin/envoy"), "--mode", "validate", "--config-path", disaggregated / "envoy.yaml")
    run(program("prometheus/*/promtool"), "check", "config", disaggregated / "prometheus.yaml")


def test_requests_reach_decode_servers_through_their_sidecars(disaggregated: Path) -> None:
    endpoints = read(disaggregated / "endpoints.yaml")["endpoints"]
    assert [(e["name"], e["port"], e["labels"]["llm-d.ai/role"]) for e in endpoints] == [
        ("prefill-0", "18100", "prefill"),
        ("decode-0", "18200", "decode"),
        ("decode-1", "18201", "decode"),
    ]
    command = program_section(disaggregated, "sidecar-decode-1")["command"]
    assert "--port 18201 --model-server-port 18102" in command


def test_prefill_and_decode_servers_move_kv(disaggregated: Path) -> None:
    for name, role, port in (("prefill-0", "kv_producer", "18300"), ("decode-1", "kv_consumer", "18302")):
        environment = environment_of(disaggregated, name)
        assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == port
        assert [Path(part).parent.name for part in environment["PYTHONPATH"].split(":")] == ["engine", "nixl"]
        assert role in program_section(disaggregated, name)["command"]


@pytest.mark.parametrize(
    ("arm", "decider"),
    [
        ("by-threshold", {"type": "prefix-based-pd-decider", "parameters": {"nonCachedTokens": 300}}),
        ("always-split", {"type": "always-disagg-pd-decider"}),
        ("never-split", {"type": "prefix-based-pd-decider", "parameters": {"nonCachedTokens": 0}}),
    ],
)
def test_the_arms_differ_only_in_who_decides(disaggregated: Path, arm: str, decider: dict[str, Any]) -> None:
    config = read(disaggregated / f"picker-{arm}.yaml")
    assert decider in config["plugins"]
    config["plugins"].remove(decider)
    handler = next(plugin for plugin in config["plugins"] if plugin["type"] == "disagg-profile-handler")
    assert handler["parameters"].pop("deciders") == {"prefill": decider["type"]}
    other = read(disaggregated / "picker-never-split.yaml")
    assert [p["type"] for p in other["plugins"] if "decider" not in p["type"]] == [p["type"] for p in config["plugins"]]
    assert config["schedulingProfiles"] == other["schedulingProfiles"]


@pytest.fixture(scope="module")
def autoscaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("state"), {"scenario": "autoscaling", "autoscaling_price_per_hour": 2.5})


def test_the_scaler_reads_what_is_rendered_for_it(autoscaled: Path) -> None:
    command = shlex.split(program_section(autoscaled, "autoscale")["command"])
    assert command[1:3] == ["-m", "llmtrace.autoscale"]
    found, socket = options(command[3:])
    assert socket.name == "supervisor.sock"
    assert [entry.name for entry in found.replicas] == ["vllm-0", "vllm-1", "vllm-2"]
    spec = found.scaled_object.hpa()
    assert (spec.minimum, spec.maximum, spec.down.window_s) == (1, 3, 30)
    assert [(target.name, target.value) for target in spec.targets] == [
        ("epp-queue-size", 1.0),
        ("epp-running-requests", 6.0),
    ]
    queries = [trigger.metadata.query for trigger in found.scaled_object.spec.triggers]
    assert all('model_name="smollm2-135m-reports"' in query for query in queries)
    assert found.price == 2.5
    assert environment_of(autoscaled, "autoscale")["OTEL_TRACES_EXPORTER"] == "otlp"


def test_servers_beyond_the_fewest_are_described_and_not_started(autoscaled: Path) -> None:
    starts = {name: program_section(autoscaled, name)["autostart"] for name in ("vllm-0", "vllm-1", "vllm-2", "envoy")}
    assert starts == {"vllm-0": "true", "vllm-1": "false", "vllm-2": "false", "envoy": "true"}
    assert [entry["name"] for entry in read(autoscaled / "scaled-endpoints.yaml")["endpoints"]] == ["vllm-0"]
    command = shlex.split(program_section(autoscaled, "vllm-1")["command"])
    assert command[command.index("--served-model-name") + 1 :][:2] == ["smollm2-135m", "smollm2-135m-reports"]
    assert command[command.index("--max-num-seqs") + 1] == "4"


def test_the_picker_of_the_autoscaled_arm_has_flow_control(autoscaled: Path) -> None:
    found = config.load(autoscaled / "picker-autoscaled.yaml", Handle())
    assert found.flow_control is not None
    assert found.flow_control.ttl_s == 120.0
    assert "--refresh-metrics-interval" in program_section(autoscaled, "picker-autoscaled")["command"]


def test_promtool_accepts_the_configuration_with_the_scaler(autoscaled: Path) -> None:
    run(program("prometheus/*/promtool"), "check", "config", autoscaled / "prometheus.yaml")
    jobs = {job["job_name"]: job for job in read(autoscaled / "prometheus.yaml")["scrape_configs"]}
    assert jobs["picker"]["scrape_interval"] == "1s"
    assert "autoscale" in jobs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(
        tmp_path_factory.mktemp("state"), {"scenario": "wide-ep", "wide_ep_ranks": 3, "wide_ep_step_every": 8}
    )


def test_a_mixture_of_experts_is_one_server_with_its_ranks(wide: Path) -> None:
    options = ServerOptions()
    options.realize(["-c", str(wide / "supervisord.conf")])
    names = {group.name for group in options.process_group_configs}
    assert names == {"envoy", "collector", "prometheus", "store", "picker-balanced", "moe-0"}
    command = shlex.split(program_section(wide, "moe-0")["command"])
    assert command[command.index("--data-parallel-size") + 1] == "3"
    assert "--enable-expert-parallel" in command
    assert command[command.index("--served-model-name") + 1] == "tiny-moe"
    assert Path(command[command.index("--model") + 1]).name.startswith("tiny-moe-")
    found = environment_of(wide, "moe-0")
    assert (ids.every(found), ids.experts_every(found)) == (8, 8)
    plugin, shim = (Path(part) for part in found["PYTHONPATH"].split(":"))
    assert plugin.parent.name == "engine"
    module, _, _ = command[command.index("--worker-extension-cls") + 1].partition(".")
    assert (shim / f"{module}.py").is_file()


def test_ranks_are_one_endpoint_behind_their_picker(wide: Path) -> None:
    assert [(e["name"], e["port"]) for e in read(wide / "endpoints.yaml")["endpoints"]] == [("moe-0", "18100")]
    assert config.load(wide / "picker-balanced.yaml", Handle()).profiles.keys() == {"default"}
    run(program("envoy/*/envoy/_bin/envoy"), "--mode", "validate", "--config-path", wide / "envoy.yaml")
    run(program("prometheus/*/promtool"), "check", "config", wide / "prometheus.yaml")


def test_pickers_can_follow_the_servers_kv_caches(tmp_path: Path) -> None:
    changed = {"scenario": "pd-disaggregation", "prefix_cache_producer": "precise", "vllm_block_size": 64}
    etc = render(tmp_path, changed)
    servers = read(etc / "endpoints.yaml")["endpoints"]
    assert len(servers) == 3
    for server in servers:
        options = shlex.split(program_section(etc, server["name"])["command"].replace("%%", "%"))
        events = json.loads(options[options.index("--kv-events-config") + 1])
        assert "--enable-scale-out" in options
        assert events["enable_kv_cache_events"] is True
        assert events["topic"] == f"kv@{server['name']}@smollm2-135m"
        assert server["labels"]["llmtrace.kv-events"] == events["endpoint"]
        assert server["labels"]["llmtrace.kv-events-replay"] == events["replay_endpoint"]
        assert events["endpoint"].startswith(f"ipc://{tmp_path}/")
    pickers = [path for path in etc.glob("picker-*.yaml") if path.stem != "picker"]
    assert len(pickers) == 3
    for path in pickers:
        loaded = config.load(path, Handle())
        assert [producer.type for producer in loaded.producers] == ["precise-prefix-cache-producer"]
        assert loaded.tokenizer is not None
        sizes = [
            p["parameters"]["tokenProcessorConfig"] for p in read(path)["plugins"] if p["type"].startswith("precise")
        ]
        assert sizes == [{"blockSizeTokens": 64}]


def test_by_default_servers_publish_nothing(etc: Path) -> None:
    assert "kv-events" not in (etc / "endpoints.yaml").read_text()
    assert "kv-events" not in program_section(etc, "vllm-0")["command"]


def test_the_plugin_is_on_the_model_servers_path_unless_switched_off(etc: Path, tmp_path: Path) -> None:
    assert Path(environment_of(etc, "vllm-0")["PYTHONPATH"]).parent.name == "engine"
    without = render(tmp_path, {"tracing_off": ["engine"]})
    assert environment_of(without, "vllm-0")["PYTHONPATH"] == ""


def test_every_process_binds_to_loopback_only(etc: Path) -> None:
    for path in etc.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "0.0.0.0" not in text, path
            assert "[::]" not in text, path


def test_the_inventory_reaches_every_file(etc: Path) -> None:
    endpoints = read(etc / "endpoints.yaml")["endpoints"]
    assert [(entry["name"], entry["address"], entry["port"]) for entry in endpoints] == [
        ("vllm-0", "127.0.0.1", "18500"),
        ("vllm-1", "127.0.0.1", "18501"),
    ]
    jobs = {job["job_name"]: job["static_configs"] for job in read(etc / "prometheus.yaml")["scrape_configs"]}
    assert [target for entry in jobs["vllm"] for target in entry["targets"]] == [
        "127.0.0.1:18500",
        "127.0.0.1:18501",
    ]
    assert "--port 18501" in program_section(etc, "vllm-1")["command"]
    assert "--block-size 64" in program_section(etc, "vllm-1")["command"]
    assert environment_of(etc, "collector")["STORE_URL"] == "http://127.0.0.1:18501"


@pytest.mark.parametrize(("arm", "chooser"), [("prefix-aware", "max-score-picker"), ("random", "random-picker")])
def test_the_arms_differ_only_in_who_chooses(etc: Path, arm: str, chooser: str) -> None:
    config = read(etc / f"picker-{arm}.yaml")
    assert (config["apiVersion"], config["kind"]) == ("llm-d.ai/v1alpha1", "EndpointPickerConfig")
    types = [plugin["type"] for plugin in config["plugins"]]
    assert types == [
        *("file-discovery", "approx-prefix-cache-producer"),
        *("prefix-cache-scorer", "queue-scorer", "kv-cache-utilization-scorer", chooser),
    ]
    (profile,) = config["schedulingProfiles"]
    references = [(entry["pluginRef"], entry.get("weight")) for entry in profile["plugins"]]
    assert references == [
        *(("prefix-cache-scorer", 2), ("queue-scorer", 1), ("kv-cache-utilization-scorer", 1)),
        (chooser, None),
    ]
    names = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
    assert {name for name, _ in references} | {config["dataLayer"]["discovery"]["pluginRef"]} <= names
    assert config["plugins"][1]["parameters"]["blockSizeTokens"] == 64


def managers(etc: Path) -> list[dict[str, Any]]:
    listeners = read(etc / "envoy.yaml")["static_resources"]["listeners"]
    return [chain["filters"][0]["typed_config"] for listener in listeners for chain in listener["filter_chains"]]


def test_envoy_passes_the_embedded_pickers_context_on(etc: Path) -> None:
    for manager in managers(etc):
        assert manager["tracing"]["no_context_propagation"] is True
        assert manager["tracing"]["spawn_upstream_span"] is True


def test_envoy_propagates_its_own_context_with_llm_ds_picker(tmp_path: Path) -> None:
    etc = render(tmp_path, {"picker_binary": "/bin/true"})
    for manager in managers(etc):
        assert "no_context_propagation" not in manager["tracing"]
    assert program_section(etc, "picker-random")["command"].startswith("/bin/true --pool-name")


@pytest.mark.parametrize(
    ("networks", "ranges"),
    [
        ([], [None]),
        (["127.0.0.1/32"], [[("127.0.0.1", 32)], None]),
        (["10.0.0.0/8", "2001:db8::/32"], [[("10.0.0.0", 8), ("2001:db8::", 32)], None]),
    ],
)
def test_traces_are_continued_for_stated_networks_only(tmp_path: Path, networks: list[str], ranges: list[Any]) -> None:
    etc = render(tmp_path, {"trace_context_networks": networks, "trace_context_secret": "s3cret-of-16-chars"})
    run(program("envoy/*/envoy/_bin/envoy"), "--mode", "validate", "--config-path", etc / "envoy.yaml")
    for listener in read(etc / "envoy.yaml")["static_resources"]["listeners"]:
        found = []
        for chain in listener["filter_chains"]:
            match = chain.get("filter_chain_match")
            found.append(match and [(r["address_prefix"], r["prefix_len"]) for r in match["source_prefix_ranges"]])
            manager = chain["filters"][0]["typed_config"]
            mutations = manager["early_header_mutation_extensions"][0]["typed_config"]["mutations"]
            assert ({"remove": "traceparent"} in mutations) == (match is None)
            assert {"remove": "x-llmtrace-trace-secret"} in mutations, "no server sees the secret"
        assert found == ranges


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"trace_context_networks": ["10.0.0.1/8"]}, "10.0.0.1/8 has host bits set"),
        ({"trace_context_networks": ["everybody"]}, "give networks such as 10.0.0.0/8"),
        ({"trace_context_secret": "short"}, "must be 16 or more"),
        ({"trace_context_secret": "'] == '' ? 'x' : '"}, "must be 16 or more"),
    ],
)
def test_an_edge_policy_that_cannot_be_is_refused(tmp_path: Path, variables: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, variables)
