"""What the scenarios' workloads are made of: tenants and their texts, requests, chats, blocks."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import ClassVar

import yaml
from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError

Message = dict[str, str]
"""A chat message: role and content."""


class Question(BaseModel):
    """A question to a tenant's assistant, and the scripted answer that later turns carry as history."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ask: str
    answer: str


class Tenant(BaseModel):
    """A tenant: the shared context that opens all of its chats, and what its users ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    handbook: str
    questions: tuple[Question, ...]


@cache
def tenants() -> dict[str, Tenant]:
    """The tenants that ship with the kit, by short name."""
    folder = files("llmtrace.scenarios") / "tenants"
    found = sorted(f.name for f in folder.iterdir() if f.name.endswith(".yaml"))
    return {
        n.removesuffix(".yaml"): Tenant.model_validate(yaml.safe_load((folder / n).read_text("utf-8"))) for n in found
    }


@dataclass(frozen=True)
class Request:
    """One request, the same in every arm. ``model_suffix`` is appended to the name of the stack's model."""

    pair_id: str
    block: int
    tenant: str
    conversation: str
    turn: int
    messages: tuple[Message, ...]
    model_suffix: str = ""


@dataclass(frozen=True)
class Chat:
    """The turns of one conversation, sent one after the other, ``at_s`` seconds after the block's start at the
    earliest."""

    requests: tuple[Request, ...]
    at_s: float = 0.0


@dataclass(frozen=True)
class Workload(ABC):
    """Sizes of a workload.

    ``conversations`` is the number of conversations of each tenant in a block. Everything follows from
    ``seed``.
    """

    blocks: int = 3
    conversations: int = 2
    turns: int = 2
    seed: int = 1

    most_requests: ClassVar[int] = 2000
    """Requests of an arm: with all arms, no more traces than a search gives."""
    most_turns: ClassVar[int | None] = None
    """None: as many as a tenant has questions."""

    def __post_init__(self) -> None:
        longest = self.most_turns or min(len(t.questions) for t in tenants().values())
        for name, value, most in (
            ("blocks", self.blocks, 50),
            ("conversations", self.conversations, 20),
            ("turns", self.turns, longest),
        ):
            if not 1 <= value <= most:
                raise UserError(f"{name} is {value}; give a number from 1 to {most}")
        if self.size > self.most_requests:
            raise UserError(
                f"the workload has {self.size} requests for each arm; make it smaller, the answer reads "
                f"{self.most_requests}"
            )

    @property
    @abstractmethod
    def size(self) -> int:
        """Requests in one arm."""

    @abstractmethod
    def chats(self, block: int) -> list[Chat]:
        """The chats of a block, in the order in which they are started."""

    def arm_order(self, block: int, arms: tuple[str, ...]) -> tuple[str, ...]:
        """Order of the arms within a block: turned by one from block to block, the first one drawn from the seed.

        So each arm comes first, second and so on equally often.
        """
        first = (block + random.Random(self.seed).randrange(len(arms))) % len(arms)
        return arms[first:] + arms[:first]
