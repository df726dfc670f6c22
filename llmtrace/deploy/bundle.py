"""A bundle: a folder with everything that a cluster's hosts get, and a file that says what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrace.deploy.oci import sha256
from llmtrace.errors import UserError

INDEX = "bundle.json"
FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds.

    Versions by component, sha256 by path, the path of each image's archive by its name, and the names of the packages
    that hosts need, whether or not they are in it.
    """

    versions: Mapping[str, str]
    files: Mapping[str, str]
    images: Mapping[str, str]
    host_packages: Sequence[str]


def contents(folder: Path, versions: Mapping[str, str], images: Mapping[str, str], host_packages: Sequence[str]) -> str:
    """Text of the index of what is in ``folder`` now."""
    files = {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != INDEX
    }
    index = {
        "format": FORMAT,
        "versions": dict(versions),
        "host_packages": list(host_packages),
        "images": dict(sorted(images.items())),
        "files": files,
    }
    return json.dumps(index, indent=1) + "\n"


def read(folder: Path) -> Bundle:
    """The bundle in ``folder``; UserError where there is none that can be read."""
    path = folder / INDEX
    try:
        index: Any = json.loads(path.read_text())
        found = Bundle(index["versions"], index["files"], index["images"], index["host_packages"])
    except FileNotFoundError:
        raise UserError(
            f"there is no bundle in {folder}: make one with `ansible-playbook playbooks/bundle.yml -e bundle={folder}`"
            ", or correct the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the bundle again with playbooks/bundle.yml") from None
    if index.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {index.get('format')!r}, and this kit reads {FORMAT}: "
            "make the bundle again with playbooks/bundle.yml"
        )
    return found


def check(folder: Path, bundle: Bundle, needed: Iterable[str] = ()) -> list[str]:
    """What is wrong with a bundle, a sentence each: files missing or damaged, ``needed`` images not in it."""
    wrong = []
    for name, digest in bundle.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"the bundle {folder} lacks {name}, which its {INDEX} lists: make it again, or copy it again")
        elif sha256(path) != digest:
            wrong.append(f"{name} of the bundle {folder} is damaged (its sha256 differs): copy the bundle again")
    wrong += [
        f"the bundle {folder} has no image {name}: make the bundle again with playbooks/bundle.yml"
        for name in needed
        if name not in bundle.images
    ]
    return wrong
