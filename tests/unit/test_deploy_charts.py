"""What is decided about a release, and what is said of one that fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import semver
import yaml
from pyhelm3 import Client, Command, Error, ReleaseNotFoundError

from llmtrace.deploy import charts
from llmtrace.deploy.charts import Charts, Outcome, Wanted
from llmtrace.deploy.manifests import Kubectl
from llmtrace.errors import UserError

WANTED = Wanted("keda", "keda", "keda", "https://kedacore.github.io/charts", "2.21.1", {"replicas": 2})
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "keda-operator"},
    "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "keda-operator"}}},
}
LATE = b"Error: UPGRADE FAILED: context deadline exceeded"


class Helm(Command):
    """Answers for helm: one release, whose revisions it keeps, and upgrades that fail as told."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "2.21.1"
        self.revisions: list[tuple[str, str, Mapping[str, Any]]] = []
        """Status, version and values of each."""
        self.fails: bytes | None = None
        self.keeps_failed = True
        self.did: list[str] = []

    def client_version(self) -> semver.Version:
        return semver.Version(3, 22, 0)

    async def run(self, command: list[Any], input: bytes | None = None) -> bytes:  # noqa: A002
        verb = str(command[0])
        if verb == "show":
            return f"apiVersion: v2\nname: keda\nversion: {self.version}\n".encode()
        if verb in ("upgrade", "rollback", "uninstall"):
            self.did.append(" ".join(map(str, (w for w in command if w in (verb, "--dry-run", "--wait")))))
            return self._change(verb, command, json.loads(input or b"{}"))
        if not self.revisions:
            raise ReleaseNotFoundError(1, b"", b"Error: release: not found")
        status, version, values = self.revisions[-1]
        if verb == "history":
            found = [
                {"revision": n, "status": each[0], "updated": "2026-12-01T00:00:00Z"}
                for n, each in enumerate(self.revisions, 1)
            ]
            return json.dumps(found).encode()
        if verb == "get" and command[1] == "values":
            return json.dumps(values).encode()
        if verb == "get":
            return f"apiVersion: v2\nname: keda\nversion: {version}\n".encode()
        return self._status(status)

    def _status(self, status: str) -> bytes:
        info = {"status": status, "last_deployed": "2026-12-01T00:00:00Z"}
        answer = {
            "name": "keda", "namespace": "keda", "version": len(self.revisions), "info": info,
            "manifest": yaml.safe_dump(DEPLOYMENT),
        }  # fmt: skip
        return json.dumps(answer).encode()

    def _change(self, verb: str, command: list[Any], values: Mapping[str, Any]) -> bytes:
        if verb == "uninstall":
            self.revisions.clear()
        elif verb == "rollback":
            _, version, former = self.revisions[int(command[2]) - 1]
            self.revisions.append(("deployed", version, former))
        elif "--dry-run" not in command:
            if self.fails:
                if self.keeps_failed:
                    self.revisions.append(("failed", self.version, values))
                raise Error(1, b"", self.fails)
            self.revisions.append(("deployed", self.version, values))
        return self._status("deployed")


@pytest.fixture
def helm() -> Helm:
    return Helm()


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Deployment that the cluster has, with a pod; ready as told."""
    status = {"observedGeneration": 1, "readyReplicas": 1, "updatedReplicas": 1}
    metadata = {"name": "keda-operator", "namespace": "keda", "generation": 1}
    there: dict[str, Any] = DEPLOYMENT | {"metadata": metadata, "status": status}
    pod = {"metadata": {"name": "keda-operator-1"}, "status": {"phase": "Pending"}}

    def run(self: Kubectl, arguments: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        items = [pod] if arguments[1] == "pods" else [there]
        return subprocess.CompletedProcess(arguments, 0, json.dumps({"items": items}), "")

    monkeypatch.setattr(Kubectl, "run", run)
    return there


async def ensure(helm: Helm, *, check: bool = False, timeout_s: int = 1) -> Outcome:
    client = Client(helm, executable="true")
    return await Charts(client, Kubectl(Path("kubectl"), Path("config")), timeout_s).ensure(WANTED, check=check)


async def test_what_is_not_there_is_installed(helm: Helm) -> None:
    assert (await ensure(helm)).changed
    assert helm.revisions == [("deployed", "2.21.1", {"replicas": 2})]


async def test_what_is_as_it_shall_be_is_left_alone(helm: Helm) -> None:
    helm.revisions = [("deployed", "2.21.1", {"replicas": 2})]
    assert not (await ensure(helm)).changed
    assert helm.did == []


@pytest.mark.parametrize(
    "revision",
    [
        ("deployed", "2.20.2", {"replicas": 2}),
        ("deployed", "2.21.1", {"replicas": 1}),
        ("deployed", "2.21.1", {"replicas": 2, "former": True}),
        ("failed", "2.21.1", {"replicas": 2}),
    ],
)
async def test_what_differs_is_upgraded(helm: Helm, revision: tuple[str, str, dict[str, Any]]) -> None:
    helm.revisions = [revision]
    assert (await ensure(helm, check=True)).changed
    assert helm.did == ["upgrade --dry-run"]
    assert (await ensure(helm)).changed
    assert helm.did[1:] == ["upgrade --wait"]
    assert helm.revisions[-1] == ("deployed", "2.21.1", {"replicas": 2})


async def test_what_was_interrupted_is_brought_back_first_and_not_by_check_mode(helm: Helm) -> None:
    helm.revisions = [("deployed", "2.20.2", {}), ("pending-upgrade", "2.21.1", {"replicas": 2})]
    assert (await ensure(helm, check=True)).changed
    assert helm.did == ["upgrade --dry-run"]
    helm.revisions[1:] = [("pending-install", "2.21.1", {"replicas": 2})]
    assert (await ensure(helm)).changed
    assert helm.did[1:] == ["uninstall --wait", "upgrade --wait"]


async def test_what_was_ready_and_is_no_more_is_named_and_stays(helm: Helm, cluster: dict[str, Any]) -> None:
    helm.revisions = [("deployed", "2.21.1", {"replicas": 2})]
    cluster["status"] = {}
    with pytest.raises(UserError, match="after 1 s Deployment keda/keda-operator has 0 of 1 pods ready"):
        await ensure(helm)
    assert helm.did == []
    # Not waited for.
    assert not (await ensure(helm, timeout_s=0)).changed


@pytest.mark.parametrize(
    ("history", "undone", "where"),
    [
        ([], "uninstall --wait", "Nothing was there before, and what was installed is removed"),
        ([("failed", "2.20.2", {})], "uninstall --wait", "Nothing was there before, and what was installed is removed"),
        ([("deployed", "2.20.2", {})], "rollback --wait", "It is back at what revision 1 was"),
        (
            [("deployed", "2.20.2", {}), ("failed", "2.21.1", {})],
            "rollback --wait",
            "It is back at what revision 1 was",
        ),
    ],
)
async def test_what_does_not_get_ready_is_named_and_undone(
    helm: Helm, cluster: dict[str, Any], history: list[tuple[str, str, dict[str, Any]]], undone: str, where: str
) -> None:
    helm.revisions = history
    helm.fails = LATE
    cluster["status"] = {}
    with pytest.raises(UserError) as failed:
        await ensure(helm)
    sentence = "Deployment keda/keda-operator has 0 of 1 pods ready (keda-operator-1: it is Pending)"
    assert str(failed.value).startswith(f"after 1 s {sentence}. {where}. Repair that")
    assert helm.did == ["upgrade --wait", undone]


async def test_what_helm_refuses_is_said_in_its_words_and_nothing_is_undone(helm: Helm) -> None:
    helm.revisions = [("deployed", "2.20.2", {})]
    helm.fails, helm.keeps_failed = b"Error: values don't meet\nthe schema", False
    with pytest.raises(UserError, match=r"^helm failed: values don't meet the schema$"):
        await ensure(helm)
    assert helm.did == ["upgrade --wait"]


async def test_a_file_of_another_version_is_refused(helm: Helm) -> None:
    helm.version = "2.20.2"
    with pytest.raises(UserError, match=r"keda is version 2\.20\.2, and 2\.21\.1 is wanted"):
        await ensure(helm)


def test_secrets_are_not_shown() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "data": {"key": "czNjcmV0"}}
    shown = charts.document([None, secret, DEPLOYMENT])
    assert [each["kind"] for each in yaml.safe_load_all(shown)] == ["Deployment", "Secret"]
    assert "czNjcmV0" not in shown
    assert "key: (hidden)" in shown


def test_no_helm_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: build it with"):
        charts.client(str(tmp_path / "helm"), tmp_path / "config")
