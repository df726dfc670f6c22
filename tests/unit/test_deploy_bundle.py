"""What a bundle says of itself, and what is said of one that is not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrace.deploy import bundle
from llmtrace.errors import UserError

IMAGE = "registry.k8s.io/pause:3.10.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pause.tar").write_text("image")
    text = bundle.contents(tmp_path, {"kubernetes": "1.34.3"}, {IMAGE: "images/pause.tar"}, ["containerd"])
    (tmp_path / bundle.INDEX).write_text(text)
    return tmp_path


def test_a_bundle_is_what_was_written(folder: Path) -> None:
    found = bundle.read(folder)
    assert found.versions == {"kubernetes": "1.34.3"}
    assert found.images == {IMAGE: "images/pause.tar"}
    assert found.host_packages == ["containerd"]
    assert list(found.files) == ["images/pause.tar"]
    assert bundle.check(folder, found, [IMAGE]) == []


def test_files_that_are_missing_or_damaged_and_images_that_are_not_in_it(folder: Path) -> None:
    found = bundle.read(folder)
    (folder / "images/pause.tar").write_text("another")
    assert "images/pause.tar of the bundle" in bundle.check(folder, found)[0]
    assert "is damaged" in bundle.check(folder, found)[0]
    (folder / "images/pause.tar").unlink()
    assert "lacks images/pause.tar, which its bundle.json lists" in bundle.check(folder, found)[0]
    assert "has no image etcd:1" in bundle.check(folder, found, ["etcd:1"])[1]


def test_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"no bundle in {tmp_path}: make one with `ansible-playbook playbooks/bundle.yml"
    ):
        bundle.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"versions": {}, "files": {}}'])
def test_a_damaged_index_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / bundle.INDEX).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        bundle.read(tmp_path)


def test_another_format_is_refused(folder: Path) -> None:
    index = json.loads((folder / bundle.INDEX).read_text())
    (folder / bundle.INDEX).write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(UserError, match="has the format 2, and this kit reads 1"):
        bundle.read(folder)
