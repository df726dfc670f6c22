"""The source of pinned vLLM releases: taken from the package index once, unpacked, never built.

The index is the one that pip is configured for (``pip config list``: its files and PIP_* variables), else that of uv's
variables, else the library's own.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import httpx2
from unearth import PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.errors import HashMismatchError, UnpackError
from unearth.fetchers import PyPIClient

PACKAGE = "vllm"
PINS = {
    "0.32.0": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    "0.33.0": "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
}
"""sha256 of the sdist, by version."""
TIMEOUT_S = 60.0
"""For each connection and each read."""


class SourceUnavailableError(Exception):
    """The source is neither here nor to be had; one sentence."""


def folder(version: str, cache: Path) -> Path:
    """Where the source of ``version`` lies, once it is there: the folder that holds the package ``vllm``."""
    return cache / "vllm-source" / version


def fetch(version: str, sha256: str, cache: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The package ``vllm`` of ``version`` below ``cache``; from the index where it is not there yet.

    Raises SourceUnavailableError.
    """
    place = folder(version, cache)
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, for runs side by side; not .partial, which `llmtrace doctor` takes for an install.
        with tempfile.TemporaryDirectory(prefix=f".{version}.", dir=place.parent) as partial:
            archive = _download(version, sha256, Path(partial), environment)
            unpacked = Path(partial) / "unpacked"
            _unpack(archive, unpacked)
            try:
                unpacked.rename(place)
            except OSError:
                if not place.is_dir():  # else another run was quicker
                    raise
    return place / PACKAGE


def _download(version: str, sha256: str, target: Path, environment: Mapping[str, str]) -> Path:
    wanted = {"sha256": [sha256]}
    try:
        with _finder(environment) as finder:
            found = next(iter(finder.find_matches(f"{PACKAGE}=={version}")), None)
            if found is None:
                raise _unavailable(version, "the index does not have it")
            return finder.download(found.link, target, wanted)
    except HashMismatchError:
        raise _unavailable(version, f"the file there has not the sha256 {sha256}") from None
    except httpx2.TransportError as error:
        raise _unavailable(version, f"{type(error).__name__}: {error}") from None
    except (httpx2.HTTPError, UnpackError) as error:  # their texts may hold a URL with a password
        raise _unavailable(version, type(error).__name__) from None


def _unavailable(version: str, why: str) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"The source of {PACKAGE} {version} cannot be taken from the package index ({why}): check the network and the "
        "index that pip is configured for (`python -m pip config list`)."
    )


def _unpack(archive: Path, target: Path) -> None:
    """The Python files of the package, without the archive's own top folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or path.parts[:1] != (PACKAGE,) or path.suffix != ".py" or ".." in path.parts:
                continue
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                shutil.copyfileobj(content, file)


@contextmanager
def _finder(environment: Mapping[str, str]) -> Iterator[PackageFinder]:
    """A finder of sdists where pip, or else uv, is configured to look."""
    settings = pip_settings(environment)
    uv_index = environment.get("UV_DEFAULT_INDEX") or environment.get("UV_INDEX_URL") or ""
    index = settings.get("index-url") or re.sub(r"^[\w.-]+=", "", uv_index)  # uv allows NAME=URL
    # Without any index the finder takes its own default.
    indexes = [*index.split(), *settings.get("extra-index-url", "").split()]
    verify = ssl.create_default_context(cafile=settings["cert"]) if "cert" in settings else True
    trusted = settings.get("trusted-host", "").split()
    with PyPIClient(trusted_hosts=trusted, verify=verify, timeout=TIMEOUT_S, follow_redirects=True) as session:
        session.auth = MultiDomainBasicAuth(prompting=False, index_urls=indexes)
        finder = PackageFinder(
            session,  # type: ignore[arg-type] # unearth's own class, which its protocol is too narrow for
            index_urls=indexes,
            no_binary=[PACKAGE],
            ignore_compatibility=True,
        )
        if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            finder.sources.clear()
        for link in settings.get("find-links", "").split():
            if "://" in link or Path(link).exists():
                finder.add_find_links(link)
        yield finder


def pip_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What pip is configured with for downloads, by option; the environment goes over the files."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    ran = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if ran.returncode != 0:
        raise SourceUnavailableError("pip's configuration cannot be read: see `python -m pip config list`.")
    found: dict[str, str] = {}
    for section in ("global.", "download.", ":env:."):
        for line in ran.stdout.splitlines():
            option, _, value = line.removeprefix(section).partition("=")
            if line.startswith(section):
                found[option] = str(ast.literal_eval(value))
    return found
