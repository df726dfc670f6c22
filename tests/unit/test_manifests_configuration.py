"""The configuration that pods get is the one of the repository, and the real programs take it as it arrives there."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from collecting import FLAGS, FOLDER, RENDERINGS
from deployed import program
from manifest_renders import AUTOSCALING, PD, WIDE_EP, find, pod, rendered, variables
from opentelemetry.sdk.metrics import MeterProvider
from picking import Handle

from grafana import queries
from llmtrace.deploy.playbook import CHECKOUT
from llmtrace.engine import meters
from llmtrace.engine.steps import ids
from llmtrace.engine.steps.sender import NODE_VARIABLES, node_name
from llmtrace.picker import config
from manifests.checks.render import MANIFESTS, OVERLAYS

COLLECTORS = {"agent": ("DaemonSet", "collector-agent"), "gateway": ("StatefulSet", "collector-gateway")}
SCENARIOS = [overlay for overlay in OVERLAYS if overlay != "observability"]


def unpack(configmap: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in configmap["data"].items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("role", COLLECTORS)
def test_collectors_run_the_renderings_of_the_documentation(role: str) -> None:
    arguments = pod(rendered("observability"), *COLLECTORS[role])["containers"][0]["args"]
    files = [*RENDERINGS[role], *(("agent-kubernetes",) if role == "agent" else ())]
    assert arguments == [*FLAGS, *(f"--config=/etc/otelcol/{name}.yaml" for name in files)]


@pytest.mark.parametrize("role", COLLECTORS)
@pytest.mark.parametrize("components", [(), ("capture-content",), ("several-gateways",)], ids="+".join)
def test_the_collector_accepts_what_its_pod_has(role: str, components: tuple[str, ...], tmp_path: Path) -> None:
    """Arguments, files and variables all come from the manifests; only the folder is another."""
    items = rendered("observability", *components)
    kind, name = COLLECTORS[role]
    container = pod(items, kind, name)["containers"][0]
    files = unpack(find(items, "ConfigMap", name), tmp_path / "etc")
    environment = variables(container) | {
        "PATH": os.environ["PATH"],
        "KUBERNETES_SERVICE_HOST": "",
        "QUEUE_DIR": str(tmp_path / "queue"),
        # Its account's, which a pod has.
        "PICKER_TOKEN_FILE": str(tmp_path / "token"),
    }
    (tmp_path / "token").write_text("token")
    arguments = [argument.replace("/etc/otelcol", str(files)) for argument in container["args"]]
    done = subprocess.run(
        [program("collector/*/otelcol"), "validate", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_collectors_get_every_variable_that_has_no_default() -> None:
    """To `validate`, an empty address is as good as any."""
    for role, (kind, name) in COLLECTORS.items():
        for components in ((), ("several-gateways",)):
            items = rendered("observability", *components)
            container = pod(items, kind, name)["containers"][0]
            files = [Path(argument).name for argument in container["args"] if "--config" in argument]
            text = "".join((FOLDER / file).read_text() for file in files)
            wanted = set(re.findall(r"\$\{env:([A-Z0-9_]+)\}", text)) | set(re.findall(r"from_env_var: (\w+)", text))
            assert wanted
            assert wanted - variables(container).keys() == set(), role


def test_prometheus_accepts_its_configuration_and_the_alerts(tmp_path: Path) -> None:
    items = rendered("observability")
    files = unpack(find(items, "ConfigMap", "prometheus"), tmp_path / "config")
    rules = unpack(find(items, "ConfigMap", "prometheus-rules"), tmp_path / "rules")
    path = files / "prometheus.yaml"
    text = path.read_text()
    assert "/etc/prometheus/rules/*.yaml" in text
    path.write_text(text.replace("/etc/prometheus/rules", str(rules)))
    command = [program("prometheus/*/promtool"), "check", "config", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: \d+ rules found", done.stdout), done.stdout


def test_prometheus_keeps_metrics_under_the_names_of_the_local_stack() -> None:
    """Promoted attributes, translation and exemplars are the same, or queries of dashboards would find nothing."""
    local = (CHECKOUT / "playbooks/roles/prometheus/templates/prometheus.yaml.j2").read_text()
    head = yaml.safe_load(local[: local.index("scrape_configs")].replace("{{", "").replace("}}", ""))
    found = yaml.safe_load(find(rendered("observability"), "ConfigMap", "prometheus")["data"]["prometheus.yaml"])
    assert found["otlp"] == head["otlp"]
    assert found["storage"] == head["storage"]
    operated = find(rendered(PD, "prometheus-operator"), "Prometheus", "prometheus")["spec"]
    assert operated["otlp"]["promoteResourceAttributes"] == head["otlp"]["promote_resource_attributes"]
    assert operated["otlp"]["translationStrategy"] == head["otlp"]["translation_strategy"]
    assert operated["exemplars"] == {"maxSize": head["storage"]["exemplars"]["max_exemplars"]}
    assert operated["enableOTLPReceiver"] is True


def test_grafana_gets_every_dashboard_and_what_its_provisioning_names() -> None:
    items = rendered("observability")
    dashboards = find(items, "ConfigMap", "grafana-dashboards")["data"]
    generated = CHECKOUT / "grafana" / "generated"
    assert dashboards == {path.name: path.read_text() for path in generated.glob("*.json")}
    container = pod(items, "Deployment", "grafana")["containers"][0]
    data = [find(items, "ConfigMap", name)["data"] for name in ("grafana-datasources", "grafana-dashboard-providers")]
    # Without their comments.
    text = json.dumps([yaml.safe_load(content) for files in data for content in files.values()])
    assert set(re.findall(r"(?<!\$)\$([A-Z][A-Z_]+)", text)) <= variables(container).keys()
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert variables(container)["LLMTRACE_DASHBOARDS"] in mounts
    # Every link leads to a data source that is there.
    sources = {source["uid"] for content in data[0].values() for source in yaml.safe_load(content)["datasources"]}
    named = set(re.findall(r'"datasourceUid": "([^"]+)"', text))
    assert {variables(container)[uid[1:]] if uid.startswith("$") else uid for uid in named} <= sources


@pytest.mark.parametrize(("job", "selector"), [("vllm", queries.VLLM), ("picker", queries.PICKER)])
def test_the_agent_gives_what_it_scrapes_the_labels_by_which_dashboards_select(job: str, selector: str) -> None:
    found = yaml.safe_load(
        find(rendered("observability"), "ConfigMap", "collector-agent")["data"]["agent-kubernetes.yaml"]
    )
    jobs = {one["job_name"]: one for one in found["receivers"]["prometheus"]["config"]["scrape_configs"]}
    given = {rule["target_label"] for rule in jobs[job]["relabel_configs"] if "target_label" in rule}
    # The model is a label of the servers' and the picker's own.
    assert set(re.findall(r"(\w+)=~", selector)) - {"model_name"} <= given


@pytest.mark.parametrize("overlay", SCENARIOS)
def test_the_pickers_configuration_is_one(overlay: str, tmp_path: Path) -> None:
    """As the embedded picker reads it, which knows llm-d's plugins; discovery is the pool's in a cluster."""
    content = yaml.safe_load(find(rendered(overlay), "ConfigMap", "llm-d-epp")["data"]["plugins.yaml"])
    content["plugins"].append({"type": "file-discovery", "parameters": {"path": str(tmp_path / "endpoints.yaml")}})
    content["dataLayer"] = {"discovery": {"pluginRef": "file-discovery"}}
    path = tmp_path / "plugins.yaml"
    path.write_text(yaml.safe_dump(content))
    found = config.load(path, Handle())
    assert (found.flow_control is not None) == (overlay == AUTOSCALING)
    assert set(found.profiles) == ({"prefill", "decode"} if overlay in {PD, WIDE_EP} else {"default"})


def test_the_plugin_is_laid_out_as_installed(tmp_path: Path) -> None:
    """The init container's own command, on what the ConfigMap holds; then a Python that has nothing else of the kit."""
    items = rendered(PD)
    setup = pod(items, "Deployment", "model-server-decode")["initContainers"]
    (command,) = [container["command"] for container in setup if container["name"] == "llmtrace-plugin"]
    source = unpack(find(items, "ConfigMap", "llmtrace-plugin"), tmp_path / "source")
    target = tmp_path / "plugins"
    target.mkdir()
    places = {"/source": str(source), "/plugins": str(target)}
    subprocess.run(
        [sys.executable, *(re.sub("^/(source|plugins)", lambda m: places[m[0]], part) for part in command[1:])],
        check=True,
        timeout=30,
    )
    script = (
        "import importlib.metadata as m, json, sys; sys.path.insert(0, sys.argv[1]);"
        "(e,) = [e for e in m.entry_points(group='vllm.general_plugins') if e.dist.version == '0'];"
        "f = e.load(); print(json.dumps([e.name, e.value, f.__code__.co_filename]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, target], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    name, value, file = json.loads(done.stdout)
    declared = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["entry-points"][
        "vllm.general_plugins"
    ]
    assert {name: value} == declared
    assert Path(file).is_relative_to(target)


def test_the_plugin_is_complete() -> None:
    """Every module that is imported from the entry point on, wherever in it the import stands."""
    held = {
        key.removesuffix(".py").removesuffix(".__init__")
        for key in find(rendered(PD), "ConfigMap", "llmtrace-plugin")["data"]
        if key.startswith("llmtrace.")
    }
    found: set[str] = set()
    todo = {"llmtrace.engine", "llmtrace.engine.plugin"}
    while todo:
        module = todo.pop()
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            # A name in the module before it, no module.
            continue
        found.add(module)
        parents = {module.rsplit(".", level)[0] for level in range(1, module.count(".") + 1)}
        todo |= ({*imported(Path(spec.origin), module)} | parents) - found
    assert held == found


def imported(path: Path, module: str) -> set[str]:
    """The kit's modules that a file may import; names that are no modules among them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "llmtrace"}


def test_model_servers_send_their_spans_where_the_agent_takes_them() -> None:
    for overlay in SCENARIOS:
        items = rendered(overlay)
        service = find(items, "Service", "collector-agent")
        assert service["spec"]["internalTrafficPolicy"] == "Local"
        (port,) = [port["port"] for port in service["spec"]["ports"] if port["name"] == "otlp-grpc"]
        address = f"http://collector-agent.llmtrace:{port}"
        for item in items:
            if item["kind"] not in {"Deployment", "LeaderWorkerSet"} or item["metadata"]["namespace"] != "llm-d":
                continue
            spec = pod(items, item["kind"], item["metadata"]["name"])
            for container in (*spec.get("initContainers", ()), *spec["containers"]):
                if container["name"] != "llmtrace-plugin":
                    assert variables(container)["OTEL_EXPORTER_OTLP_ENDPOINT"] == address
                if container["name"] == "vllm":
                    assert variables(container)["PYTHONPATH"] == "/plugins"
                    assert f"--otlp-traces-endpoint={address}" in " ".join(container["args"])


def test_the_namespace_of_model_servers_is_traced() -> None:
    assert find(rendered(PD), "Namespace", "llm-d")["metadata"]["labels"]["llmtrace.traced"] == "true"


def test_the_sidecar_is_between_the_pools_port_and_the_servers() -> None:
    for overlay, kind, ranks in ((PD, "Deployment", 1), (WIDE_EP, "LeaderWorkerSet", 8)):
        items = rendered(overlay)
        spec = pod(items, kind, "model-server-decode")
        (sidecar,) = [container for container in spec["initContainers"] if container["name"] == "disagg-sidecar"]
        assert sidecar["restartPolicy"] == "Always"
        flags = dict(argument.lstrip("-").split("=") for argument in sidecar["args"])
        ports = [port["containerPort"] for port in sidecar["ports"]]
        assert ports == [port["number"] for port in find(items, "InferencePool", "llm-d")["spec"]["targetPorts"]]
        assert ports == [int(flags["port"]) + rank for rank in range(ranks)]
        assert int(flags.get("data-parallel-size", "1")) == ranks
        assert flags["tracing"] == "true"
        assert f"--port={flags['model-server-port']}" in " ".join(spec["containers"][0]["args"])


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_ranks_trace_the_same_steps_and_say_on_which_node(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pod of a group has one template, so what the plugin takes from the environment is the same in all."""
    (server,) = pod(rendered(WIDE_EP), "LeaderWorkerSet", f"model-server-{role}")["containers"]
    environment = variables(server)
    assert ids.every(environment) == ids.EVERY_DEFAULT
    assert ids.EVERY_VARIABLE in environment
    (node,) = [variable for variable in server["env"] if variable["name"] in NODE_VARIABLES]
    assert node["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
    assert node_name(environment) == environment[node["name"]]
    made = MeterProvider()
    monkeypatch.setattr(meters, "_own_provider", lambda: made)
    assert meters.provider(environment) is made
    # Rates on the dashboard are over windows of two minutes.
    assert int(environment["OTEL_METRIC_EXPORT_INTERVAL"]) <= 30_000
    # The agent of a pod's node takes them, as it takes the pod's spans.
    assert environment["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"] == environment["OTEL_EXPORTER_OTLP_ENDPOINT"]


def test_servers_have_time_to_end() -> None:
    """preStop, then vLLM's own timeout, then what it takes to end."""
    for overlay in SCENARIOS:
        items = rendered(overlay)
        for item in items:
            if not item["metadata"]["name"].startswith("model-server") or item["kind"] not in {
                "Deployment",
                "LeaderWorkerSet",
            }:
                continue
            spec = pod(items, item["kind"], item["metadata"]["name"])
            (server,) = spec["containers"]
            (timeout,) = re.findall(r"--shutdown-timeout=(\d+)", " ".join(server["args"]))
            before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert spec["terminationGracePeriodSeconds"] >= before + int(timeout) + 15


def test_charts_values_and_images_name_one_version_of_the_picker() -> None:
    values = yaml.safe_load((MANIFESTS / "components/router-chart/values.yaml").read_text())["router"]
    image = values["epp"]["image"]
    ours = pod(rendered(PD), "Deployment", "llm-d-epp")["containers"][0]
    assert f"{image['registry']}/{image['repository']}:{image['tag']}" == ours["image"]
    assert values["tracing"]["otelExporterEndpoint"] == variables(ours)["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert (
        values["modelServers"]["matchLabels"]
        == find(rendered(PD), "InferencePool", "llm-d")["spec"]["selector"]["matchLabels"]
    )


def test_the_page_names_every_scenario_and_component() -> None:
    page = (CHECKOUT / "docs" / "manifests.md").read_text()
    for name in (
        *SCENARIOS,
        *(f"components/{path.parent.name}" for path in MANIFESTS.glob("components/*/kustomization.yaml")),
    ):
        assert f"`{name.removeprefix('scenarios/').removeprefix('components/')}`" in page
