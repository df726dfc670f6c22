"""Container images without a container engine: one layer, in an archive that containerd imports.

Source: OCI image specification v1.1 (image-layout.md, manifest.md, config.md); the annotation is containerd's.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmtrace.errors import UserError

BIN = "usr/local/bin"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAME_ANNOTATION = "io.containerd.image.name"
CONTENT_LABEL = "llmtrace.content"
_BLOCK = 1 << 20


def file_name(image: str) -> str:
    """Name of an image's archive: ``registry.k8s.io/pause:3.10.1`` is ``registry.k8s.io_pause_3.10.1.tar``."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", image) + ".tar"


def content_digest(program: Path | None, packages: Sequence[Path], entrypoint: bool) -> str:
    """Digest of what an image is made of; it tells whether an archive is still right."""
    total = hashlib.sha256(json.dumps(entrypoint).encode())
    for path in [*([program] if program else []), *packages]:
        total.update(f"{path.name}\0{sha256(path)}\0".encode())
    return total.hexdigest()


def content_of(archive: Path) -> str | None:
    """The :func:`content_digest` that an archive was made with; None where there is no such archive."""
    try:
        with tarfile.open(archive) as tar, _member(tar, "index.json") as index:
            annotations = json.load(index)["manifests"][0]["annotations"]
    except (OSError, KeyError, IndexError, ValueError, tarfile.TarError):
        return None
    found = annotations.get(CONTENT_LABEL)
    return found if isinstance(found, str) else None


@contextmanager
def _member(tar: tarfile.TarFile, name: str) -> Iterator[IO[bytes]]:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(name)
    with file:
        yield file


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(archive: Path, name: str, program: Path | None, packages: Sequence[Path], *, entrypoint: bool) -> None:
    """Write the image ``name``: Debian ``packages`` unpacked, and ``program`` in /usr/local/bin, as user root.

    The same input gives the same bytes. UserError for a program or package that is not there.
    """
    for path in [*([program] if program else []), *packages]:
        if not path.is_file():
            raise UserError(f"the image {name} is made of {path}, which does not exist: build or fetch it first")
    content = content_digest(program, packages, entrypoint)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        layer = Path(scratch) / "layer.tar"
        _write_layer(layer, program, packages)
        layer_digest = sha256(layer)
        config: dict[str, object] = {"Env": [f"PATH={PATH}"]}
        if program and entrypoint:
            config["Entrypoint"] = [f"/{BIN}/{program.name}"]
        blobs = {}

        def blob(value: object) -> dict[str, object]:
            data = json.dumps(value, sort_keys=True).encode()
            digest = hashlib.sha256(data).hexdigest()
            blobs[digest] = data
            return {"digest": f"sha256:{digest}", "size": len(data)}

        described = blob(
            {
                "architecture": _architecture(),
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
            }
        )
        media = "application/vnd.oci.image"
        manifest = blob(
            {
                "schemaVersion": 2,
                "mediaType": f"{media}.manifest.v1+json",
                "config": {"mediaType": f"{media}.config.v1+json", **described},
                "layers": [
                    {
                        "mediaType": f"{media}.layer.v1.tar",
                        "digest": f"sha256:{layer_digest}",
                        "size": layer.stat().st_size,
                    }
                ],
            }
        )
        index = {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": f"{media}.manifest.v1+json",
                    **manifest,
                    "annotations": {NAME_ANNOTATION: name, CONTENT_LABEL: content},
                }
            ],
        }
        partial = Path(scratch) / "image.tar"
        with tarfile.open(partial, "w") as tar:
            # First, so that it is found without reading the rest.
            _add(tar, "index.json", json.dumps(index, sort_keys=True).encode())
            _add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
            for digest, data in sorted(blobs.items()):
                _add(tar, f"blobs/sha256/{digest}", data)
            with layer.open("rb") as data_file:
                member = tarfile.TarInfo(f"blobs/sha256/{layer_digest}")
                member.size = layer.stat().st_size
                tar.addfile(member, data_file)
        partial.replace(archive)


def _write_layer(layer: Path, program: Path | None, packages: Sequence[Path]) -> None:
    written: set[str] = set()
    with tarfile.open(layer, "w") as tar:
        for package in packages:
            _add_package(tar, package, written)
        for folder in ("tmp", "var", "var/tmp", "usr", "usr/local", BIN):
            if folder not in written:
                member = tarfile.TarInfo(folder)
                member.type, member.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
                tar.addfile(member)
        if program:
            member = tarfile.TarInfo(f"{BIN}/{program.name}")
            member.size, member.mode = program.stat().st_size, 0o755
            with program.open("rb") as file:
                tar.addfile(member, file)


def _add_package(tar: tarfile.TarFile, package: Path, written: set[str]) -> None:
    """Add the files of a Debian package; a folder that several have is added once."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpack,  # noqa: S603
        tarfile.open(fileobj=unpack.stdout, mode="r|") as source,
    ):
        for member in source:
            member.name = member.name.removeprefix("./").rstrip("/")
            if not member.name or member.name == "." or member.name in written:
                continue
            written.add(member.name)
            member.mtime = 0
            tar.addfile(member, source.extractfile(member) if member.isreg() else None)
    if unpack.returncode:
        raise UserError(f"{package} cannot be unpacked: remove it, and fetch the packages again")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
