"""What is kept of a scaling decision until its trace is sent, and what the scaler keeps over a restart."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from llmtrace.autoscale.hpa import Frozen, History
from llmtrace.errors import UserError


class Phase(Frozen):
    """A phase of a replica's start or stop.

    Times in nanoseconds since the epoch; ``source`` says where its end is from.
    """

    name: str
    start_ns: int
    end_ns: int
    source: str


class ReplicaRecord(BaseModel):
    """A replica that a decision starts (``up``) or stops. ``outcome`` is None while that goes on.

    ``running`` and ``cut`` are the requests on a replica to be stopped, then and when it was stopped, ``moved`` those
    that failed there and ended well on another one; None where nobody counted.
    """

    name: str
    up: bool
    started_ns: int
    ended_ns: int | None = None
    outcome: str | None = None
    failure: str = ""
    phases: list[Phase] = Field(default_factory=list)
    running: int | None = None
    cut: int | None = None
    moved: int | None = None

    def phase(self, name: str, end_ns: int, source: str) -> None:
        """The phase that ends now; it began where the one before ended."""
        start_ns = self.phases[-1].end_ns if self.phases else self.started_ns
        self.phases.append(Phase(name=name, start_ns=start_ns, end_ns=max(end_ns, start_ns), source=source))

    def end(self, outcome: str, now_ns: int, failure: str = "") -> None:
        """The replica is done with."""
        self.outcome, self.failure = outcome, failure
        self.ended_ns = max(now_ns, self.started_ns, *(p.end_ns for p in self.phases))


class MetricRecord(Frozen):
    """A metric as the scaler saw it.

    ``value`` and ``proposal`` are None where it had no value, ``failure`` says why.
    """

    name: str
    query: str
    target: float
    target_type: str
    value: float | None = None
    proposal: int | None = None
    failure: str = ""


class DecisionRecord(BaseModel):
    """A scaling decision; everything that its trace will say.

    It was taken at ``time_ns`` or at most ``resolution_ms`` later, by metrics whose samples were at most ``window_ms``
    old.
    """

    id: str
    scaler_kind: str
    scaler_name: str
    time_ns: int
    direction: str
    reason: str
    metric: str | None
    metrics: list[MetricRecord]
    current: int
    ready: int
    recommended: int | None
    desired: int
    minimum: int
    maximum: int
    stabilization: str
    limit: str
    window_ms: float
    accelerators: float
    price_per_hour: float
    resolution_ms: float = 0.0
    replicas: list[ReplicaRecord] = Field(default_factory=list)

    @property
    def window(self) -> tuple[int, int]:
        """Since when and until when requests may have been counted in its metrics, in nanoseconds since the epoch."""
        return self.time_ns - int(self.window_ms * 1e6), self.time_ns + int(self.resolution_ms * 1e6)

    @property
    def open(self) -> bool:
        """Whether a replica is still being started or stopped."""
        return any(r.outcome is None for r in self.replicas)

    @property
    def trace_id(self) -> int:
        """The id of its trace: the same however often it is sent."""
        return int.from_bytes(blake2b(self.id.encode(), digest_size=16).digest(), "big") or 1

    def span_id(self, *path: str) -> int:
        """The id of the span at this place in the trace."""
        text = "/".join((self.id, *path))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") or 1


class State(BaseModel):
    """What the scaler keeps over a restart. ``desired`` is None before its first decision.

    ``condition`` is that of the decision traced last. A decision is in ``decisions`` from before it is applied until
    its trace was handed on; what a restart finds there goes on.
    """

    desired: int | None = None
    history: History = History()
    condition: str = ""
    decisions: list[DecisionRecord] = Field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> State:
        """The state of a file, or a new one where there is none; raises UserError where it cannot be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (ValidationError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not one of this version"
            raise UserError(
                f"the scaler's state {path} cannot be read ({reason}): move it away to begin anew"
            ) from None

    def save(self, path: Path) -> None:
        """Write it as a whole, on disk before this returns."""
        write_atomically(path, self.model_dump_json(indent=1))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: whoever reads it finds the old or the new one."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
