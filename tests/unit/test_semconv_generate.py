"""What is generated from the registry: it is up to date, and drift is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llmtrace.semconv import generate
from llmtrace.semconv.definitions import registry


def test_the_generated_files_are_up_to_date() -> None:
    stale = generate.stale(generate.files(registry()))
    assert not stale, f"run `make generate`: {stale}"
    assert generate.main(["--check"]) == 0


def test_drift_is_refused_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(generate, "ATTRIBUTES", tmp_path / "attributes.py")
    monkeypatch.setattr(generate, "REFERENCE", tmp_path / "reference.md")
    assert generate.main(["--check"]) == 1
    assert "make generate" in capsys.readouterr().err
    assert not generate.ATTRIBUTES.exists()
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    generate.ATTRIBUTES.write_text(generate.ATTRIBUTES.read_text() + 'MINE = "mine"\n')
    assert generate.main(["--check"]) == 1
    assert "attributes.py does not follow" in capsys.readouterr().err


def test_the_constants_are_what_the_registry_says(tmp_path: Path) -> None:
    path = tmp_path / "generated.py"
    path.write_text(generate.constants(registry()))
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {c.name: c.value for c in registry().constants} == {k: v for k, v in vars(module).items() if k.isupper()}
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_the_reference_has_every_name() -> None:
    declared = registry()
    page = generate.files(declared)[generate.REFERENCE]
    names = {d.name for d in (*declared.spans.values(), *declared.events.values(), *declared.metrics.values())}
    for name in names | declared.attributes.keys() | {c.value for c in declared.constants}:
        assert f"`{name}" in page, name
    for line in page.splitlines():
        assert line == line.rstrip()
