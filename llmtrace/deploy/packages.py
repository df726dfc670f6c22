"""Debian packages with all that they depend on, in a folder that apt takes as a repository."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtrace.deploy.oci import sha256
from llmtrace.errors import UserError

INDEX = "Packages"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FETCH_TIMEOUT_S = 600


def fetch(folder: Path, packages: Sequence[str], mirror: str, suite: str) -> None:
    """Put ``packages`` and every package that they need into ``folder``, and index it.

    Runs apt-get without privileges and apart from this system's own packages. A package is at ``NAME.deb``, in the
    newest version of the suite. UserError where apt-get is missing or the mirror does not have them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial", "empty"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        sources = root / "sources.list"
        signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        sources.write_text(
            f"deb {signed}{mirror} {suite} main\ndeb {signed}{mirror} {suite}-updates main\n"
            f"deb {signed}{mirror.rstrip('/')}-security {suite}-security main\n"
        )
        options: dict[str, Path | str] = {
            "Dir::State": root,
            "Dir::State::lists": root / "lists",
            "Dir::State::status": root / "status",
            "Dir::Cache": root / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": root / "empty",
            "Dir::Etc::preferencesparts": root / "empty",
            "APT::Sandbox::User": "",
            "APT::Install-Recommends": "false",
            "Debug::NoLocking": "true",
        }
        _apt(options, "update")
        _apt(options, "install", "--yes", "--download-only", *packages)
        for archive in (root / "cache/archives").glob("*.deb"):
            target = folder / f"{archive.name.split('_')[0]}.deb"
            # Across file systems.
            target.write_bytes(archive.read_bytes())
    index(folder)


def _apt(options: Mapping[str, Path | str], *arguments: str) -> None:
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)  # noqa: S603
    except FileNotFoundError:
        raise UserError(
            "apt-get is not on PATH: make the bundle on Debian or Ubuntu, or say -e bundle_packages=false"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the packages did not arrive within {FETCH_TIMEOUT_S} s: set bundle_mirror to a near mirror"
        ) from None
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise UserError(
            f"apt-get {arguments[0]} failed ({' '.join(words[-2:])}): check bundle_mirror and the packages' names"
        )


def index(folder: Path) -> None:
    """Write the index that makes ``folder`` a flat repository (deb(5), "trusted")."""
    entries = []
    for archive in sorted(folder.glob("*.deb")):
        command = ["dpkg-deb", "--field", str(archive)]
        fields = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()  # noqa: S603
        size = archive.stat().st_size
        entries.append(f"{fields}\nFilename: ./{archive.name}\nSize: {size}\nSHA256: {sha256(archive)}\n")
    (folder / INDEX).write_text("\n".join(entries))


def pack(folder: Path, archive: Path) -> None:
    """Pack the repository in ``folder`` into a tar file; the same packages give the same bytes."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for path in [folder / INDEX, *sorted(folder.glob("*.deb"))]:
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(member, file)
    partial.replace(archive)


def indexed(folder: Path) -> set[str]:
    """Names of the packages in the index of ``folder``; empty where there is none."""
    path = folder / INDEX
    if not path.exists():
        return set()
    return set(re.findall(r"^Package: (\S+)$", path.read_text(), re.MULTILINE))
