"""The measured requests of a run: what the client saw, what the picker chose, what was done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrace.scenarios.facts import Block, Served, read_requests
from llmtrace.scenarios.pd_disaggregation.choice import Choice, read_choice
from llmtrace.scenarios.pd_disaggregation.legs import Legs, read_legs
from llmtrace.scenarios.pd_disaggregation.rule import Decider, decider_of
from llmtrace.traces.model import Trace


@dataclass(frozen=True)
class Handled:
    """One measured request; ``configured`` is its arm's decider, where another source than the picker tells it."""

    served: Served
    choice: Choice
    legs: Legs
    configured: Decider | None = None

    @property
    def was_split(self) -> bool:
        """Whether two servers handled it; only where neither sidecar nor servers tell, by the picker's word."""
        if self.legs.sidecar_split is None and self.legs.prefill is None:
            return bool(self.choice.split)
        return bool(self.legs.sidecar_split) or self.legs.prefill is not None

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt as the model server counts them."""
        told = self.legs.decode.prompt_tokens if self.legs.decode else None
        return self.served.input_tokens if told is None else told

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that the decode server had in its own cache."""
        told = self.legs.decode.local_cached_tokens if self.legs.decode else None
        # The client's usage of a split request counts what came from the prefill server as well.
        return self.served.cached_tokens if told is None and not self.was_split else told


def read_handled(traces: Iterable[Trace], blocks: Sequence[Block]) -> list[Handled]:
    """The measured requests in order of time; each arm's decider is that of its block."""
    traces = list(traces)
    by_id = {trace.trace_id: trace for trace in traces}
    deciders = {(b.arm, b.block): decider_of(b.attributes) for b in blocks}
    return [handled(by_id[s.trace_id], s, deciders.get((s.arm, s.block))) for s in read_requests(traces)]


def handled(trace: Trace, served: Served, configured: Decider | None) -> Handled:
    """The request of one trace, as the client's span tells it."""
    legs = read_legs(trace)
    return Handled(served, read_choice(trace, served, legs, configured), legs, configured)
