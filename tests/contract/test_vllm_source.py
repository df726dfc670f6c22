"""Taking the source of a vLLM release from the configured index: an index of one small sdist, in a folder."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import vllm_source
from vllm_source import SourceUnavailableError, fetch, pip_settings

VERSION = "9.9.0"
FILES = {
    "vllm/__init__.py": "",
    "vllm/v1/engine/__init__.py": "engine = 1\n",
    "vllm/kernels.cu": "no Python",
    "vllm/../../escaped.py": "outside",
    "tests/test_vllm.py": "no part of the package",
    "setup.py": "raise SystemExit('built')",
}


class Index:
    """A package index in ``folder`` with one release of ``vllm``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "simple"
        self.sdist = self.folder / "vllm" / f"vllm-{VERSION}.tar.gz"
        self.sdist.parent.mkdir(parents=True)
        with tarfile.open(self.sdist, "w:gz") as tar:
            for name, text in FILES.items():
                member = tarfile.TarInfo(f"vllm-{VERSION}/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        (self.sdist.parent / "index.html").write_text(f'<a href="{self.sdist.name}">{self.sdist.name}</a>')
        self.sha256 = hashlib.sha256(self.sdist.read_bytes()).hexdigest()
        self.url = self.folder.as_uri()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def environment(**variables: str) -> dict[str, str]:
    """One in which no configuration of this machine's pip or uv counts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull} | variables


@pytest.fixture
def nowhere() -> str:
    """An index that refuses connections; its URL has a password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://reader:s3cret@127.0.0.1:{free.getsockname()[1]}/simple"


def test_only_the_python_files_of_the_package_and_only_once(index: Index, cache: Path, nowhere: str) -> None:
    package = fetch(VERSION, index.sha256, cache, environment(PIP_INDEX_URL=index.url))
    assert package == cache / "vllm-source" / VERSION / "vllm"
    found = {str(path.relative_to(package.parent)): path.read_text() for path in cache.rglob("*") if path.is_file()}
    assert found == {name: FILES[name] for name in ("vllm/__init__.py", "vllm/v1/engine/__init__.py")}
    assert [path.name for path in package.parent.parent.iterdir()] == [VERSION]
    assert fetch(VERSION, index.sha256, cache, environment(PIP_INDEX_URL=nowhere)) == package


def fault(index: Index, cache: Path, sha256: str = "", version: str = VERSION, **variables: str) -> str:
    with pytest.raises(SourceUnavailableError) as raised:
        fetch(version, sha256 or index.sha256, cache, environment(**variables))
    assert not list((cache / "vllm-source").iterdir()), "something half done was left"
    return str(raised.value)


def test_what_is_wrong_is_said(index: Index, cache: Path, nowhere: str) -> None:
    said = fault(index, cache, PIP_INDEX_URL=nowhere)
    assert said.startswith(f"The source of vllm {VERSION} cannot be taken from the package index (ConnectError: ")
    assert "s3cret" not in said
    assert "does not have it" in fault(index, cache, version="9.9.1", PIP_INDEX_URL=index.url)
    assert "has not the sha256 0000" in fault(index, cache, sha256="0" * 64, PIP_INDEX_URL=index.url)
    assert "pip's configuration" in fault(index, cache, PIP_CONFIG_FILE=str(index.sdist))


def test_the_index_is_that_of_pip_else_that_of_uv(index: Index, cache: Path, nowhere: str, tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(f"[global]\nindex-url = {nowhere}\ntimeout = 7\n[download]\nindex-url = {index.url}\n")
    configured = environment(PIP_CONFIG_FILE=str(file), PIP_TRUSTED_HOST="a b", UV_DEFAULT_INDEX=nowhere)
    wanted = {"index-url": index.url, "timeout": "7", "trusted-host": "a b"}
    assert pip_settings(configured).items() >= wanted.items()
    works = [
        configured,
        environment(PIP_CONFIG_FILE=str(file), PIP_INDEX_URL=index.url),
        environment(UV_DEFAULT_INDEX=f"mirror={index.url}"),
        environment(UV_INDEX_URL=index.url),
        environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=f"{tmp_path}/absent {index.sdist.parent}"),
    ]
    for number, variables in enumerate(works):
        assert fetch(VERSION, index.sha256, cache / str(number), variables).is_dir()


@pytest.mark.parametrize(("offline", "result"), [("", "2 errors"), ("1", "2 skipped")])
def test_a_source_that_cannot_be_had_is_no_silent_skip(cache: Path, nowhere: str, offline: str, result: str) -> None:
    """The contract test itself, on a machine without the sources."""
    test = Path(vllm_source.__file__).with_name("test_engine_compat.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "every_hook_and_name", str(test)]
    variables = environment(XDG_CACHE_HOME=str(cache), PIP_INDEX_URL=nowhere, LLMTRACE_OFFLINE=offline)
    variables.pop("LLMTRACE_VLLM_SOURCES", None)
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert result in ran.stdout.splitlines()[-1], ran.stdout
    assert (ran.returncode == 0) == bool(offline)
    assert "LLMTRACE_OFFLINE" in ran.stdout
    assert "s3cret" not in ran.stdout
