"""Charts by the real helm in a real API server: installed, upgraded, looked at in check mode, rolled back.

There is no kubelet, so pods never get ready: the first chart has none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_plane import ADMIN, Plane, control_plane, program
from loopback import until

from llmtrace.deploy.playbook import CHECKOUT, playbooks_dir

MODULE = playbooks_dir() / "plugins/modules/llmtrace_chart.py"
NAMESPACE = "charts"
TIMEOUT_S = 3
pytestmark = pytest.mark.timeout(240)

CONFIG = """
apiVersion: v1
kind: ConfigMap
metadata: {name: {{ .Release.Name }}}
data: {greeting: {{ .Values.greeting | quote }}}
"""
SECRET = """
apiVersion: v1
kind: Secret
metadata: {name: {{ .Release.Name }}}
stringData: {key: {{ .Values.key | quote }}}
"""
SERVER = """
{{ if .Values.server }}
apiVersion: apps/v1
kind: Deployment
metadata: {name: {{ .Release.Name }}}
spec:
  selector: {matchLabels: {app: {{ .Release.Name }}}}
  template:
    metadata: {labels: {app: {{ .Release.Name }}}}
    spec: {containers: [{name: server, image: server}]}
{{ end }}
"""


def write_chart(folder: Path, version: str) -> Path:
    path = folder / version / "greeter"
    (path / "templates").mkdir(parents=True)
    (path / "Chart.yaml").write_text(yaml.safe_dump({"apiVersion": "v2", "name": "greeter", "version": version}))
    (path / "values.yaml").write_text(yaml.safe_dump({"greeting": "hello", "key": "s3cret", "server": False}))
    for name, text in {"config": CONFIG, "secret": SECRET, "server": SERVER}.items():
        (path / "templates" / f"{name}.yaml").write_text(text)
    return path


@dataclass(frozen=True)
class Charts:
    """The module, with the cluster that it works on."""

    plane: Plane
    folder: Path

    def ensure(self, name: str, version: str, *, check: bool = False, **values: Any) -> dict[str, Any]:
        """Run the module as ansible does, and return what it says."""
        arguments = {
            "helm": program("helm", "helm"),
            "kubectl": program("kubernetes", "kubectl"),
            "kubeconfig": str(self.plane.kubeconfig(ADMIN)),
            "name": name,
            "namespace": NAMESPACE,
            "chart": str(self.folder / version / "greeter"),
            "version": version,
            "values": values,
            "timeout_s": TIMEOUT_S,
            "_ansible_check_mode": check,
        }
        done = subprocess.run(
            [sys.executable, MODULE],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            env=os.environ | {"HELM_CACHE_HOME": str(self.folder / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def get(self, plural: str, name: str, group: str = "api/v1") -> Mapping[str, Any]:
        return self.plane.call("GET", f"/{group}/namespaces/{NAMESPACE}/{plural}/{name}")

    def greeting(self, name: str) -> str | None:
        """What the release's ConfigMap says; None where it is not there."""
        found = self.get("configmaps", name)
        return found["data"]["greeting"] if "data" in found else None

    def revisions(self, name: str) -> int:
        """How many revisions helm keeps of a release."""
        secrets = self.plane.call("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets").get("items", [])
        return sum(secret["metadata"]["labels"].get("name") == name for secret in secrets if secret["type"] != "Opaque")


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Charts]:
    program("helm", "helm")
    folder = tmp_path_factory.mktemp("charts")
    for version in ("0.1.0", "0.2.0"):
        write_chart(folder, version)
    (folder / "plane").mkdir()
    with control_plane(folder / "plane") as running:
        yield Charts(running.plane, folder)


def test_a_release_is_brought_to_chart_and_values_and_no_further(charts: Charts) -> None:
    first = charts.ensure("one", "0.1.0", check=True)
    assert first["changed"]
    assert first["diff"]["before"] == ""
    assert "greeting: hello" in first["diff"]["after"]
    assert charts.greeting("one") is None

    assert charts.ensure("one", "0.1.0")["changed"]
    assert charts.greeting("one") == "hello"
    again = charts.ensure("one", "0.1.0")
    assert not again["changed"]
    assert again["diff"]["before"] == again["diff"]["after"]
    assert charts.revisions("one") == 1

    # Other values; check mode says what they would change.
    shown = charts.ensure("one", "0.1.0", check=True, greeting="good evening")
    assert shown["changed"]
    assert "greeting: hello" in shown["diff"]["before"]
    assert "greeting: good evening" in shown["diff"]["after"]
    assert "(hidden)" in shown["diff"]["after"]
    assert "s3cret" not in json.dumps(shown)
    assert charts.greeting("one") == "hello"
    assert charts.ensure("one", "0.1.0", greeting="good evening")["changed"]
    assert charts.greeting("one") == "good evening"

    # Another version, and values that are not wanted any more.
    assert charts.ensure("one", "0.2.0")["changed"]
    assert charts.greeting("one") == "hello"
    assert not charts.ensure("one", "0.2.0", check=True)["changed"]
    assert charts.revisions("one") == 3


def test_what_does_not_get_ready_is_named_and_undone(charts: Charts) -> None:
    sentence = f"after {TIMEOUT_S} s Deployment {NAMESPACE}/two has 0 of 1 pods ready (two-"

    first = charts.ensure("two", "0.1.0", server=True)
    assert first["failed"]
    assert first["msg"].startswith(f"two: {sentence}")
    assert "it is Pending" in first["msg"]
    assert "what was installed is removed" in first["msg"]
    assert charts.revisions("two") == 0
    until(lambda: charts.greeting("two") is None, "the release's ConfigMap to go")

    assert charts.ensure("two", "0.1.0", greeting="good morning")["changed"]
    upgrade = charts.ensure("two", "0.2.0", server=True)
    assert upgrade["failed"]
    assert upgrade["msg"].startswith(f"two: {sentence}")
    assert "It is back at what revision 1 was" in upgrade["msg"]
    assert charts.greeting("two") == "good morning"
    assert charts.get("deployments", "two", "apis/apps/v1")["code"] == 404
    assert not charts.ensure("two", "0.1.0", greeting="good morning")["changed"]


def test_a_chart_that_cannot_be_had_is_a_sentence(charts: Charts) -> None:
    answer = charts.ensure("three", "9.9.9")
    assert answer["failed"]
    assert answer["msg"].startswith("three: helm failed: ")
    assert charts.revisions("three") == 0


def test_the_playbook_brings_what_the_inventory_names_and_then_nothing(charts: Charts) -> None:
    """Definitions of custom resources from their Go module, and a release from a bundle."""
    bundle = charts.folder / "bundle"
    (bundle / "charts").mkdir(parents=True)
    chart, to = charts.folder / "0.1.0" / "greeter", bundle / "charts"
    subprocess.run([program("helm", "helm"), "package", chart, "--destination", to], check=True, capture_output=True)
    versions = yaml.safe_load((playbooks_dir() / "vars" / "versions.yml").read_text())
    release = {"chart": "oci://registry.invalid/greeter", "version": "0.1.0", "namespace": NAMESPACE}
    variables = {
        "bundle": str(bundle),
        "cluster_kubeconfig": str(charts.plane.kubeconfig(ADMIN)),
        "cluster_kubectl": program("kubernetes", "kubectl"),
        "cluster_charts": ["four", "gateway-api"],
        "cluster_chart_values": {"four": {"greeting": "good night"}},
        "cluster_charts_timeout_s": TIMEOUT_S,
        "charts": {"gateway-api": versions["charts"]["gateway-api"], "four": release},
    }
    inventory = charts.folder / "inventory.json"
    inventory.write_text(json.dumps({"kubernetes": {"hosts": {"prod": {}}}}))

    def changes() -> int:
        done = subprocess.run(
            [
                Path(sys.executable).parent / "ansible-playbook",
                f"--inventory={inventory}",
                playbooks_dir() / "site.yml",
                f"--extra-vars={json.dumps(variables)}",
            ],
            env=os.environ | {"ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg")},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return int(re.findall(r"prod: ok=\d+, changed=(\d+)", done.stdout)[0])

    assert changes() >= 2
    assert charts.greeting("four") == "good night"
    assert charts.plane.serves("/apis/gateway.networking.k8s.io/v1/httproutes")
    assert changes() == 0
