"""The requests of the pd-disaggregation scenario: short and long, cold and warm, so that both choices come up."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from llmtrace.scenarios.workload import Chat, Message, Question, Request, Tenant, Workload, tenants

MOST_PARAGRAPHS = 6
"""Paragraphs of an excerpt."""


@dataclass(frozen=True)
class PdWorkload(Workload):
    """For each tenant, conversation by conversation, three chats that differ in what has to be prefilled.

    - *desk*: the whole handbook and a question: long and cold. Its second turn is long and warm; the third adds an
      excerpt from another tenant's handbook: long, warm but for some hundred tokens. ``turns`` are those of this chat.
    - *excerpt*: one to six paragraphs from the middle of the handbook and a question: a cold prompt of any length.
    - *short*: a question alone.
    """

    blocks: int = 1
    conversations: int = 1
    turns: int = 3

    most_requests: ClassVar[int] = 1600
    most_turns: ClassVar[int] = 3

    @property
    def size(self) -> int:
        """Requests in one arm."""
        return self.blocks * self.conversations * (self.turns + 2) * len(tenants())

    def chats(self, block: int) -> list[Chat]:
        """The chats of a block, in the order in which they are started."""
        rng = random.Random(f"{self.seed}/{block}")
        chats = []
        for number in range(self.conversations):
            for name in tenants():
                where = f"{name}-{block}-{number}"
                chats += [
                    _chat(f"{where}-desk", block, name, _desk(name, self.turns, rng)),
                    _chat(f"{where}-excerpt", block, name, [_excerpt_prompt(tenants()[name], rng)]),
                    _chat(f"{where}-short", block, name, [(_user(rng.choice(tenants()[name].questions).ask),)]),
                ]
        rng.shuffle(chats)
        return chats


def smoke_requests() -> list[Request]:
    """One of each kind, in this order: long and cold, long and warm, short."""
    rng = random.Random(0)
    name, other = list(tenants())[:2]
    desk = _chat("verify-desk", 0, name, _desk(name, 2, rng))
    short = _chat("verify-short", 0, other, [(_user(tenants()[other].questions[0].ask),)])
    return [*desk.requests, *short.requests]


def _chat(conversation: str, block: int, tenant: str, prompts: list[tuple[Message, ...]]) -> Chat:
    return Chat(
        tuple(
            Request(f"{conversation}-{turn}", block, tenant, conversation, turn, messages)
            for turn, messages in enumerate(prompts)
        )
    )


def _desk(name: str, turns: int, rng: random.Random) -> list[tuple[Message, ...]]:
    """The prompts of a chat that opens with the handbook; each one holds those before it."""
    tenant = tenants()[name]
    script = rng.sample(tenant.questions, 2)
    other = tenants()[rng.choice([n for n in tenants() if n != name])]
    pasted = f"A colleague elsewhere follows these rules:\n\n{_excerpt(other, rng)}\n\nWhich of them do we have too?"
    asked = [*(q.ask for q in script), pasted][:turns]
    messages: tuple[Message, ...] = ({"role": "system", "content": tenant.handbook},)
    prompts = []
    for turn, ask in enumerate(asked):
        messages += (_user(ask),)
        prompts.append(messages)
        if turn < len(script):
            messages += ({"role": "assistant", "content": script[turn].answer},)
    return prompts


def _excerpt_prompt(tenant: Tenant, rng: random.Random) -> tuple[Message, ...]:
    question: Question = rng.choice(tenant.questions)
    return (_user(f"From our handbook:\n\n{_excerpt(tenant, rng)}\n\n{question.ask}"),)


def _excerpt(tenant: Tenant, rng: random.Random) -> str:
    """Some paragraphs in a row, not from the start: no prompt that begins with the handbook warms them."""
    paragraphs = [p for p in tenant.handbook.split("\n") if p]
    count = rng.randint(1, MOST_PARAGRAPHS)
    start = rng.randint(1, len(paragraphs) - count)
    return "\n\n".join(paragraphs[start : start + count])


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
