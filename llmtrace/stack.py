"""The state file of a running stack: what runs where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrace.errors import UserError


def state_home() -> Path:
    """Folder of the local stack's state (XDG_STATE_HOME, by default ~/.local/state)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "llmtrace-kit/local"


def cache_home() -> Path:
    """Folder of the kit's downloads and builds (XDG_CACHE_HOME, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrace-kit"


def default_path() -> Path:
    """Path of the state file: the variable LLMTRACE_STACK, else stack.json in the state folder."""
    return Path(os.environ.get("LLMTRACE_STACK") or state_home() / "stack.json")


class Part(BaseModel):
    """Base of the state file's objects."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Part):
    """A model server: its name, base URL and supervised process; ``role`` is both, prefill or decode.

    One in ``standby`` runs only when a scaler starts it.
    """

    name: str
    url: str
    process: str = ""
    role: str = "both"
    standby: bool = False


class Sidecar(Part):
    """The P/D sidecar before a decode server."""

    process: str
    url: str


class Scaler(Part):
    """The scaler: its process, the port of its metrics on 127.0.0.1, and its ScaledObject."""

    process: str
    metrics_port: int
    config: Path


class Picker(Part):
    """An endpoint picker: its EndpointPickerConfig file and, of the local stack, its process and ports on 127.0.0.1."""

    config: Path
    process: str = ""
    grpc_port: int = 0
    health_port: int = 0
    metrics_port: int = 0


class Stack(Part):
    """A stack that was stood up for a scenario. Addresses are base URLs without a trailing slash.

    Of the profile ``cluster`` the fields up to ``pickers`` are told, as far as a person knows them, and the rest is
    empty: Kubernetes knows it.
    """

    profile: Literal["local", "cluster"]
    scenario: str
    run_dir: Path
    model: str
    gateways: dict[str, str]
    collector_otlp_grpc: str
    store: str
    servers: list[Server] = []
    kv_block_size: int = 16
    pickers: dict[str, Picker] = {}
    sidecars: list[Sidecar] = []
    scaler: Scaler | None = None
    log_dir: Path = Path()
    supervisor_conf: Path = Path()
    envoy_admin: str = ""
    collector_otlp_http: str = ""
    collector_health: str = ""
    prometheus: str = ""
    versions: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path | None = None) -> Stack:
        """Read the state file.

        Raises UserError where no stack is up or the file is not one of this version.
        """
        path = path or default_path()
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"No stack is up ({path} does not exist): run `llmtrace up`") from None
        except (ValidationError, OSError) as error:
            reason = (
                f"{error.error_count()} fields do not fit" if isinstance(error, ValidationError) else error.strerror
            )
            raise UserError(f"The state file {path} cannot be read ({reason}): run `llmtrace up` again") from None

    def save(self, path: Path) -> bool:
        """Write the state file atomically; return whether its content changed."""
        text = self.model_dump_json(indent=2) + "\n"
        try:
            if path.read_text() == text:
                return False
        except FileNotFoundError:
            pass
        temporary = path.with_suffix(".partial")
        temporary.write_text(text)
        temporary.replace(path)
        return True

    @property
    def supervisor_socket(self) -> Path:
        """The unix socket of the stack's supervisord."""
        return self.run_dir / "supervisor.sock"
