"""The requests of the autoscaling scenario: calm, a burst of reports, calm again; a few chats all the while."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from llmtrace.scenarios.autoscaling.arms import CHATS, DRIVING, REPORTS
from llmtrace.scenarios.workload import Chat, Message, Request, Tenant, Workload, tenants

CALM_S = 20.0
"""Before the burst."""
BURST_S = 40.0
CALM_AFTER_S = 110.0
"""Long enough for the replicas to be taken away again."""
REPORTS_PER_S = 1.0
"""For each of ``conversations``."""
CHAT_EVERY_S = 5.0
MOST_PARAGRAPHS = 4


@dataclass(frozen=True)
class AutoscalingWorkload(Workload):
    """Requests that arrive at set times, whatever became of those before: a block is one burst with the calm around it.

    ``conversations`` scales the burst. Requests have no further turns.
    """

    blocks: int = 1
    turns: int = 1

    most_turns: ClassVar[int | None] = 1

    @property
    def size(self) -> int:
        """Requests in one arm."""
        return self.blocks * (self._reports + self._chats)

    @property
    def _reports(self) -> int:
        return int(BURST_S * REPORTS_PER_S * self.conversations)

    @property
    def _chats(self) -> int:
        return int((CALM_S + BURST_S + CALM_AFTER_S) / CHAT_EVERY_S)

    def chats(self, block: int) -> list[Chat]:
        """The requests of a block in order of time, each with the time after the block's start at which it is sent."""
        rng = random.Random(f"{self.seed}/{block}")
        names = list(tenants())
        made = []
        for number in range(self._reports):
            tenant = tenants()[rng.choice(names)]
            at_s = CALM_S + (number + rng.random()) / (REPORTS_PER_S * self.conversations)
            made.append(_one(f"{REPORTS}-{block}-{number}", block, REPORTS, _report(tenant, rng), at_s))
        for number in range(self._chats):
            question = rng.choice(tenants()[rng.choice(names)].questions)
            messages: tuple[Message, ...] = ({"role": "user", "content": question.ask},)
            at_s = (number + rng.random()) * CHAT_EVERY_S
            made.append(_one(f"{CHATS}-{block}-{number}", block, CHATS, messages, at_s))
        return sorted(made, key=lambda chat: chat.at_s)


def smoke_requests() -> list[Request]:
    """One of each kind."""
    chats = AutoscalingWorkload().chats(0)
    kinds = {chat.requests[0].tenant: chat.requests[0] for chat in chats}
    return [kinds[CHATS], kinds[REPORTS]]


def _one(name: str, block: int, kind: str, messages: tuple[Message, ...], at_s: float) -> Chat:
    model = DRIVING if kind == REPORTS else ""
    return Chat((Request(name, block, kind, name, 0, messages, model),), at_s)


def _report(tenant: Tenant, rng: random.Random) -> tuple[Message, ...]:
    """A few paragraphs in a row of a tenant's handbook, to be summed up."""
    paragraphs = [p for p in tenant.handbook.split("\n") if p]
    count = rng.randint(2, MOST_PARAGRAPHS)
    start = rng.randint(0, len(paragraphs) - count)
    text = "\n\n".join(paragraphs[start : start + count])
    return ({"role": "user", "content": f"Write a report on these rules:\n\n{text}"},)
