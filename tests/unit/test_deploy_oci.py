"""Images without a container engine: what is in the archive, and when it is written again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from llmtrace.deploy import oci, packages
from llmtrace.errors import UserError

NAME = "registry.k8s.io/pause:3.10.1"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "pause"
    path.write_bytes(b"\x7fELF")
    return path


def debian_package(folder: Path, name: str, files: dict[str, str]) -> Path:
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, folder / f"{name}.deb"], check=True)
    return folder / f"{name}.deb"


def written(tmp_path: Path, program: Path | None, debs: list[Path], *, entrypoint: bool = False) -> Path:
    archive = tmp_path / oci.file_name(NAME)
    oci.write(archive, NAME, program, debs, entrypoint=entrypoint)
    return archive


def blob(tar: tarfile.TarFile, descriptor: dict[str, Any]) -> bytes:
    file = tar.extractfile("blobs/" + descriptor["digest"].replace(":", "/"))
    assert file is not None
    data = file.read()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (descriptor["size"], descriptor["digest"][7:])
    return data


def test_the_archive_is_an_oci_layout_that_names_its_image(tmp_path: Path, program: Path) -> None:
    debs = [
        debian_package(tmp_path, "one", {"etc/one": "1", "etc/both": "from one"}),
        debian_package(tmp_path, "two", {"etc/both": "from two"}),
    ]
    with tarfile.open(written(tmp_path, program, debs, entrypoint=True)) as tar:
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
        (described,) = index["manifests"]
        assert described["annotations"]["io.containerd.image.name"] == NAME
        manifest = json.loads(blob(tar, described))
        config = json.loads(blob(tar, manifest["config"]))
        (layer,) = manifest["layers"]
        (tmp_path / "layer.tar").write_bytes(blob(tar, layer))
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    assert config["config"]["Entrypoint"] == ["/usr/local/bin/pause"]
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert tar.getmember("usr/local/bin/pause").mode == 0o755
        assert tar.getmember("tmp").mode == 0o1777
        assert tar.getnames().count("etc/both") == 1
        assert tar.extractfile("etc/both").read() == b"from one"  # type: ignore[union-attr]
        assert {member.uid for member in tar} == {0}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path, program: Path) -> None:
    first = written(tmp_path, program, []).read_bytes()
    program.touch()
    assert written(tmp_path, program, []).read_bytes() == first


def test_an_archive_knows_what_it_was_made_of(tmp_path: Path, program: Path) -> None:
    archive = tmp_path / oci.file_name(NAME)
    assert oci.content_of(archive) is None
    written(tmp_path, program, [])
    assert oci.content_of(archive) == oci.content_digest(program, [], entrypoint=False)
    program.write_bytes(b"another")
    assert oci.content_of(archive) != oci.content_digest(program, [], entrypoint=False)
    archive.write_bytes(b"broken")
    assert oci.content_of(archive) is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is made of .*nowhere, which does not exist"):
        written(tmp_path, tmp_path / "nowhere", [])


def test_packages_in_a_folder_are_a_repository(tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    assert packages.indexed(folder) == set()
    debian_package(folder, "one", {"etc/one": "1"})
    packages.index(folder)
    assert packages.indexed(folder) == {"one"}
    entry = (folder / packages.INDEX).read_text()
    assert "Filename: ./one.deb\n" in entry
    assert f"SHA256: {oci.sha256(folder / 'one.deb')}\n" in entry
    packages.pack(folder, tmp_path / "packages.tar")
    with tarfile.open(tmp_path / "packages.tar") as tar:
        assert tar.getnames() == ["Packages", "one.deb"]
