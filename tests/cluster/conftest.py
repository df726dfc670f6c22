"""One cluster for all tests of this folder, on machines that are made for it and removed after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import workload
import yaml
from clusters import NEXT_VERSION, Cluster
from machines import CACHE, Lab, run

from llmtrace.deploy.playbook import CHECKOUT

BUNDLE, NEXT_BUNDLE = CACHE / "bundle-test", CACHE / "bundle-test-next"
KEEP = "LLMTRACE_KEEP_MACHINES"
"""Set, the machines are left as they are, for a look at them, and the next run begins with them."""


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The bundle; made from source where the cache has none, which takes a quarter of an hour."""
    if missing := workload.missing():
        pytest.fail(f"{missing[0]} does not exist: run `make demo` once, which installs it")
    return make(BUNDLE, bundle_extra_images=workload.IMAGES)


@pytest.fixture(scope="session")
def next_bundle() -> Path:
    """A bundle of the next version of Kubernetes, for hosts that have their packages; some minutes without a cache."""
    versions = yaml.safe_load((CHECKOUT / "playbooks/vars/versions.yml").read_text())["versions"]
    return make(NEXT_BUNDLE, bundle_packages=False, versions={**versions, "kubernetes": NEXT_VERSION})


def make(folder: Path, **variables: object) -> Path:
    """Run bundle.yml; what is there and right stays."""
    run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            CHECKOUT / "playbooks/bundle.yml",
            f"--extra-vars={json.dumps({'bundle': str(folder), **variables})}",
        ],
        timeout_s=3000,
        environment={"ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg")},
    )
    return folder


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three machines."""
    keep = bool(os.environ.get(KEEP))
    folder = Path("/var/tmp/llmtrace-test") if keep else tmp_path_factory.mktemp("machines")
    lab = Lab(folder, ["cp-1", "gpu-1", "gpu-2"], workload.SHARED)
    try:
        lab.start()
        yield lab
    finally:
        if not keep:
            lab.stop()


@pytest.fixture(scope="session")
def cluster(lab: Lab, bundle: Path) -> Cluster:
    """The machines with what site.yml needs; nothing is installed yet, or by an earlier test."""
    return Cluster(lab, bundle, lab.folder / "kubeconfig")
