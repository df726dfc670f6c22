"""The requests of the prefix-cache scenario: tenants with a long shared context each, multi-turn chats."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from llmtrace.scenarios.workload import Chat, Message, Request, Tenant, Workload, tenants

SMOKE_REQUESTS = 2


@dataclass(frozen=True)
class PrefixCacheWorkload(Workload):
    """Conversations that open with their tenant's handbook. ``turns`` are those of each conversation."""

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


def smoke_requests() -> list[Request]:
    """The first turns of a small workload, one block apart from any measured run."""
    chats = PrefixCacheWorkload(blocks=1, conversations=1, turns=1).chats(0)
    return [replace(chat.requests[0], pair_id=f"verify-{n}") for n, chat in enumerate(chats[:SMOKE_REQUESTS])]
