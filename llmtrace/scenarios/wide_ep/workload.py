"""The requests of the wide-ep scenario: many short chats at once, of which each generates a while."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

from llmtrace.scenarios.workload import Chat, Request, Workload, tenants

SMOKE_REQUESTS = 2


@dataclass(frozen=True)
class WideEpWorkload(Workload):
    """Questions of all tenants without their handbooks, each a chat of one turn: so that both ranks have work."""

    blocks: int = 2
    conversations: int = 3
    turns: int = 1

    most_turns: ClassVar[int | None] = 1

    @property
    def size(self) -> int:
        """Requests in one arm."""
        return self.blocks * self.conversations * len(tenants())

    def chats(self, block: int) -> list[Chat]:
        """The chats of a block, in the order in which they are started."""
        rng = random.Random(f"{self.seed}/{block}")
        chats = []
        for name, tenant in tenants().items():
            for number in range(self.conversations):
                conversation = f"{name}-{block}-{number}"
                content = f"{rng.randrange(10**6)}. {rng.choice(tenant.questions).ask}"
                message = {"role": "user", "content": content}
                chats.append(Chat((Request(f"{conversation}-0", block, name, conversation, 0, (message,)),)))
        rng.shuffle(chats)
        return chats


def smoke_requests() -> list[Request]:
    """The first ones of a small workload, one block apart from any measured run."""
    chats = WideEpWorkload(blocks=1, conversations=1).chats(0)
    return [replace(chat.requests[0], pair_id=f"verify-{n}") for n, chat in enumerate(chats[:SMOKE_REQUESTS])]
