"""Every TraceQL of the dashboards is TraceQL by Grafana's own grammar, the npm package @grafana/lezer-traceql."""

from __future__ import annotations

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from deployed import CACHE

from grafana.generate import FOLDER
from grafana.substitute import built_in, defaults, substitute

SOURCE = Path(__file__).parents[1] / "traceql"
FILES = ("package.json", "package-lock.json", "parse.mjs")


@pytest.fixture(scope="module")
def grammar() -> Path:
    """The folder with the grammar installed, in the kit's cache; npm fetches it once."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.fail("there are no node and npm on PATH: run this by `uv run`, whose environment has them")
    digest = sha256(b"".join((SOURCE / name).read_bytes() for name in FILES)).hexdigest()[:12]
    folder = CACHE / "lezer-traceql" / digest
    if not (folder / "node_modules" / ".package-lock.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copy(SOURCE / name, folder)
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"npm cannot install @grafana/lezer-traceql: {done.stderr.strip()[-200:]}")
    return folder


def faults(folder: Path, queries: list[str]) -> list[list[int]]:
    done = subprocess.run(
        ["node", "parse.mjs"],
        cwd=folder,
        input=json.dumps(queries),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: list[list[int]] = json.loads(done.stdout)
    return found


def of_dashboards() -> dict[str, str]:
    """Every TraceQL query by where it is, as Grafana would send it."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(path.read_text())
        values = defaults(dashboard) | built_in(15, 5, 900)
        for panel in (p for top in dashboard["panels"] for p in (top.get("panels") or [top])):
            for target in panel.get("targets", ()):
                if target.get("queryType") == "traceql":
                    found[f"{path.stem}: {panel['title']}"] = substitute(target["query"], values)
    return found


def test_every_query_is_traceql(grammar: Path) -> None:
    queries = of_dashboards()
    assert len(queries) >= 10
    found = dict(zip(queries, faults(grammar, list(queries.values())), strict=True))
    assert {where: at for where, at in found.items() if at} == {}


def test_what_is_no_traceql_is_found(grammar: Path) -> None:
    assert all(faults(grammar, ["{ name = }", "{ span.x > 1", '{ name = "x" && }', "{ name ?? 1 }"]))
    assert faults(grammar, ['{ name = "x" } | count() > 1']) == [[]]
