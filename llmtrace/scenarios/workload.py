"""The requests of the prefix-cache scenario: tenants with a long shared context each, multi-turn chats."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict

from llmtrace.errors import UserError

MOST_REQUESTS = 2000
"""Requests of an arm: with both arms, no more traces than a search gives."""

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
    """One request, the same in both arms."""

    pair_id: str
    block: int
    tenant: str
    conversation: str
    turn: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Chat:
    """The turns of one conversation, sent one after the other."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Workload:
    """Sizes of the workload.

    ``conversations`` is the number of conversations of each tenant in a block. Everything follows from
    ``seed``.
    """

    blocks: int = 3
    conversations: int = 2
    turns: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        longest = min(len(t.questions) for t in tenants().values())
        for name, value, most in (
            ("blocks", self.blocks, 50),
            ("conversations", self.conversations, 20),
            ("turns", self.turns, longest),
        ):
            if not 1 <= value <= most:
                raise UserError(f"{name} is {value}; give a number from 1 to {most}")
        if self.size > MOST_REQUESTS:
            raise UserError(
                f"the workload has {self.size} requests for each arm; make it smaller, the answer reads {MOST_REQUESTS}"
            )

    @property
    def size(self) -> int:
        """Requests in one arm."""
        return self.blocks * self.conversations * self.turns * len(tenants())

    def chats(self, block: int) -> list[Chat]:
        """The chats of a block, in the order in which they are started."""
        rng = random.Random(f"{self.seed}/{block}")
        chats = [
            self._chat(block, name, tenant, number, rng)
            for number in range(self.conversations)
            for name, tenant in tenants().items()
        ]
        rng.shuffle(chats)
        return chats

    def _chat(self, block: int, name: str, tenant: Tenant, number: int, rng: random.Random) -> Chat:
        script = rng.sample(tenant.questions, self.turns)
        conversation = f"{name}-{block}-{number}"
        messages: tuple[Message, ...] = ({"role": "system", "content": tenant.handbook},)
        requests = []
        for turn, question in enumerate(script):
            messages += ({"role": "user", "content": question.ask},)
            requests.append(Request(f"{conversation}-{turn}", block, name, conversation, turn, messages))
            messages += ({"role": "assistant", "content": question.answer},)
        return Chat(tuple(requests))

    def arm_order(self, block: int, arms: tuple[str, str]) -> tuple[str, str]:
        """Order of the arms within a block: ABBA from block to block, the first one drawn from the seed."""
        first = random.Random(self.seed).randrange(2)
        return arms if (block + first) % 2 == 0 else (arms[1], arms[0])
