"""The Collector's renderings as it judges them itself, and what can only be read here."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from collecting import FLAGS, FOLDER, RENDERINGS, Collector, backend, read
from deployed import program

FRAGMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("builder", "kustomization"))
VALIDATED = {
    **RENDERINGS,
    "local, content captured": (*RENDERINGS["local"], "capture-content"),
    "agent in Kubernetes, content captured": (*RENDERINGS["agent in Kubernetes"], "capture-content"),
    "agent in Kubernetes, of several gateways": (*RENDERINGS["agent of several gateways"], "agent-kubernetes"),
    "gateway, content captured": (*RENDERINGS["gateway"], "capture-content"),
}


@pytest.mark.parametrize("name", VALIDATED)
def test_the_collector_accepts_the_rendering(name: str, tmp_path: Path) -> None:
    with backend() as store:
        collector = Collector(VALIDATED[name], tmp_path, store, {"KUBERNETES_SERVICE_HOST": "", "HOSTNAME": "h"})
    configs = [part for part in collector.command if part.startswith("--config=")]
    command = [program("collector/*/otelcol"), "validate", *FLAGS, *configs]
    done = subprocess.run(command, env=collector.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_fragment_is_part_of_a_validated_rendering() -> None:
    used = {name for rendering in VALIDATED.values() for name in rendering}
    assert used == {*FRAGMENTS}


def test_to_gateways_differs_from_to_gateway_in_the_exporter_only() -> None:
    """Same queue, same retries, and behind them routing by trace id."""
    (one,) = read("to-gateway")["exporters"].values()
    several = read("to-gateways")["exporters"]["loadbalancing/gateways"]
    assert several["routing_key"] == "traceID"
    assert several["sending_queue"] == one["sending_queue"] | {"enabled": True}
    assert several["retry_on_failure"] == one["retry_on_failure"] | {"enabled": True}
    assert several["protocol"]["otlp"]["sending_queue"] == {"enabled": False}
    assert read("to-gateways")["service"]["pipelines"]["traces"]["exporters"] == ["loadbalancing/gateways"]


def test_the_builders_manifest_has_every_component() -> None:
    built = (FOLDER / "builder.yaml").read_text().replace("_", "")
    wanted = set()
    for name in FRAGMENTS:
        for kind in ("receivers", "processors", "exporters", "connectors", "extensions"):
            wanted |= {key.split("/")[0].replace("_", "") for key in read(name).get(kind, {})}
    # otlp_grpc is the exporter of otlpexporter.
    wanted = {"otlpexporter" if name == "otlpgrpc" else name for name in wanted}
    assert len(wanted) > 10
    assert [name for name in wanted if f"/{name}" not in built] == []


def test_nothing_listens_beyond_loopback_unless_told() -> None:
    text = json.dumps([read(name) for name in FRAGMENTS])
    assert "0.0.0.0" not in text
    assert "${env:METRICS_HOST:-127.0.0.1}" in text


@pytest.mark.parametrize("name", ["local", "agent", "gateway", "agent-kubernetes", "prometheus"])
def test_every_pipeline_of_received_data_is_guarded(name: str) -> None:
    guards = ["transform/redaction", "transform/content", "redaction/content", "redaction/secrets"]
    pipelines = read(name)["service"]["pipelines"]
    assert pipelines
    for pipeline in pipelines.values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert [p for p in pipeline["processors"] if p in guards] == guards


def test_no_batch_is_between_a_sender_and_the_queue_on_disk() -> None:
    for name in FRAGMENTS:
        assert "batch" not in read(name).get("processors", {})
    for name in ("store", "to-gateway", "to-gateways"):
        (exporter,) = read(name)["exporters"].values()
        assert exporter["sending_queue"]["storage"] == "file_storage/queue"
        assert exporter["retry_on_failure"]["max_elapsed_time"] == 0


def test_names_of_content_are_the_same_in_all_three_places() -> None:
    processors = read("redaction")["processors"]
    patterns = {
        statement.split('"')[1]
        for group in processors["transform/content"]["trace_statements"]
        for statement in group["statements"]
    }
    assert patterns == set(processors["redaction/content"]["blocked_key_patterns"])
    assert len(patterns) == 1


def test_the_environment_is_documented() -> None:
    page = (FOLDER.parent / "docs" / "collector.md").read_text()
    text = "".join((FOLDER / f"{name}.yaml").read_text() for name in FRAGMENTS)
    named = set(re.findall(r"\$\{env:([A-Z0-9_]+)", text)) | set(re.findall(r"from_env_var: (\w+)", text))
    assert named
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []
    assert all(f"`{name}.yaml`" in page for name in FRAGMENTS)
