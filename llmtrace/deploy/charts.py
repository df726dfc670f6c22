"""Bring Helm charts into a cluster: releases at a version, with values, that go back where they do not get ready."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pyhelm3 import Chart, Client, Error, ReleaseNotFoundError, ReleaseRevision, ReleaseRevisionStatus

from llmtrace.deploy import manifests
from llmtrace.deploy.manifests import Kubectl
from llmtrace.errors import UserError

HIDDEN = "(hidden)"
_WORKED = {ReleaseRevisionStatus.DEPLOYED, ReleaseRevisionStatus.SUPERSEDED}
_TIMED_OUT = ("context deadline exceeded", "timed out")


@dataclass(frozen=True)
class Wanted:
    """A release as it shall be.

    ``chart`` is the path of a packaged chart or of its folder, an address with oci:// or https://, or a name in
    ``repository``.
    """

    name: str
    namespace: str
    chart: str
    repository: str | None = None
    version: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a release, or would: the objects of its chart before and after, as YAML without secrets' data."""

    changed: bool
    before: str
    after: str


def client(program: str, kubeconfig: Path) -> Client:
    """Helm with a kubeconfig; UserError where it is not there."""
    if shutil.which(program) is None:
        raise UserError(
            f"{program} does not exist: build it with `ansible-playbook playbooks/kubernetes.yml --tags helm`, or set "
            "cluster_helm to the path of helm"
        )
    return Client(executable=program, kubeconfig=kubeconfig)


def words(error: Error) -> str:
    """What helm said, in a line."""
    said: bytes = error.stderr or error.stdout
    return " ".join(said.decode(errors="replace").split())[-600:].removeprefix("Error: ")


def document(resources: Iterable[Mapping[str, Any] | None]) -> str:
    """Objects as YAML, in a steady order and without what their Secrets hold."""
    shown = []
    for resource in resources:
        if resource is None:
            continue
        hidden = {
            part: dict.fromkeys(resource[part], HIDDEN)
            for part in ("data", "stringData")
            if resource.get("kind") == "Secret" and resource.get(part)
        }
        shown.append({**resource, **hidden})
    shown.sort(key=lambda each: (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]))
    return yaml.safe_dump_all(shown, sort_keys=True)


@dataclass(frozen=True)
class Charts:
    """The releases of a cluster, brought to what they shall be within ``timeout_s`` each; 0 does not wait."""

    helm: Client
    kubectl: Kubectl
    timeout_s: int

    async def ensure(self, wanted: Wanted, *, check: bool = False) -> Outcome:
        """Bring a release to what it shall be, or say what that would change; UserError says what hindered it."""
        try:
            chart = await self._chart(wanted)
            current = await self._current(wanted)
            changed = await self.helm.should_install_or_upgrade_release(current, chart, dict(wanted.values))
            before = document(await current.resources()) if current else ""
            if not changed:
                after = before
            elif check:
                after = document(await self._rendered(wanted, chart, current))
            else:
                after = await self._bring(wanted, chart)
        except Error as error:
            raise UserError(f"helm failed: {words(error)}") from None
        if self.timeout_s and not changed and not check:
            manifests.wait(self.kubectl, after, self.timeout_s, wanted.namespace)
        return Outcome(changed, before, after)

    async def _chart(self, wanted: Wanted) -> Chart:
        chart = await self.helm.get_chart(wanted.chart, repo=wanted.repository, version=wanted.version)
        found = chart.metadata.version
        # Where the chart is a file, helm does not look at the version that it is told.
        if wanted.version and found.removeprefix("v") != wanted.version.removeprefix("v"):
            raise UserError(f"{wanted.chart} is version {found}, and {wanted.version} is wanted: take that one")
        return chart

    async def _current(self, wanted: Wanted) -> ReleaseRevision | None:
        try:
            return await self.helm.get_current_revision(wanted.name, namespace=wanted.namespace)
        except ReleaseNotFoundError:
            return None

    async def _rendered(
        self, wanted: Wanted, chart: Chart, current: ReleaseRevision | None
    ) -> Iterable[Mapping[str, Any]]:
        """The objects that there would be."""
        if current is None:
            # A dry run would want the chart's own definitions in the cluster.
            found: Iterable[Mapping[str, Any]] = await self.helm.template_resources(
                chart, wanted.name, dict(wanted.values), namespace=wanted.namespace, no_hooks=True
            )
            return found
        revision = await self._install(wanted, chart, dry_run=True)
        resources: Iterable[Mapping[str, Any]] = await revision.resources()
        return resources

    async def _install(self, wanted: Wanted, chart: Chart, *, dry_run: bool = False) -> ReleaseRevision:
        return await self.helm.install_or_upgrade_release(
            wanted.name,
            chart,
            dict(wanted.values),
            namespace=wanted.namespace,
            # Not those of the revision before: values that are no longer wanted would stay.
            reset_values=True,
            dry_run=dry_run,
            wait=self.timeout_s > 0 and not dry_run,
            timeout=self._timeout,
        )

    async def _bring(self, wanted: Wanted, chart: Chart) -> str:
        """Install or upgrade; what fails is undone, and named with the reason of the pod that did not get ready."""
        # What an interrupted helm left pending lets no other begin.
        before = await self.helm.get_proceedable_revision(
            wanted.name, namespace=wanted.namespace, timeout=self._timeout
        )
        history = await before.release.history() if before else []
        worked = max((each.revision for each in history if each.status in _WORKED), default=None)
        try:
            return document(await (await self._install(wanted, chart)).resources())
        except Error as error:
            failed = await self._current(wanted)
            if failed is None or (before and failed.revision == before.revision):
                raise
            why = f"helm failed: {words(error)}"
            if any(sign in why for sign in _TIMED_OUT):
                text = document(await failed.resources())
                late = manifests.waiting_for(self.kubectl, text, wanted.namespace)
                why = f"after {self.timeout_s} s {'; '.join(late) or why}"
            raise UserError(f"{why}. {await self._undo(failed, worked)}. {manifests.TRY_AGAIN}") from None

    async def _undo(self, failed: ReleaseRevision, worked: int | None) -> str:
        """Go back to the last revision that worked, or to nothing where there was none; say which."""
        release = failed.release
        try:
            if worked is None:
                await release.uninstall(wait=True, timeout=self._timeout)
                return "Nothing was there before, and what was installed is removed"
            await release.rollback(worked, cleanup_on_fail=True, wait=self.timeout_s > 0, timeout=self._timeout)
        except Error as error:
            return f"The way back failed too: {words(error)}"
        return f"It is back at what revision {worked} was"

    @property
    def _timeout(self) -> str | None:
        return f"{self.timeout_s}s" if self.timeout_s else None
