"""What the plugin says of a request, against what vLLM says of it."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from engine_servers import ModelServer, new_trace_id
from loopback import Receiver

from llmtrace.semconv import attributes as names
from llmtrace.traces.model import Span, Trace

ORDER = r"queue( kv_load( queue)?)*( prefill( decode)?)?"


@dataclass(frozen=True)
class Tree:
    """An ``llm_request`` and the spans below it, in order of time."""

    request: Span
    phases: tuple[Span, ...]

    def ms(self, *wanted: str) -> float:
        """Time in the phases of these names."""
        return sum(span.duration_ms for span in self.phases if span.name in wanted)

    def said(self, name: str) -> object:
        """The attribute, from whichever phase has it; None where none has."""
        return next((span.attributes[name] for span in self.phases if name in span.attributes), None)

    def number(self, name: str) -> float:
        """Sum of a numeric attribute over the phases."""
        found = [span.attributes[name] for span in self.phases if name in span.attributes]
        assert all(isinstance(value, int | float) for value in found)
        return sum(found)  # type: ignore[arg-type]

    def vllm(self, name: str) -> float:
        """A number that vLLM gives on ``llm_request``."""
        value = self.request.attributes[name]
        assert isinstance(value, int | float)
        return value

    @property
    def reason(self) -> str:
        reasons = self.request.attributes[names.FINISH_REASONS]
        assert isinstance(reasons, list)
        (reason,) = reasons
        return str(reason)

    @property
    def order(self) -> list[str]:
        return [span.name for span in self.phases]

    def events(self, name: str) -> list[object]:
        return [event for span in self.phases for event in span.events if event.name == name]


def trees(trace: Trace) -> list[Tree]:
    """The trees of a trace. Fails where anything is in the trace besides, or a tree is not whole."""
    found = [Tree(span, tuple(trace.children(span))) for span in trace.named(names.SERVER_SPAN)]
    assert trace.duplicates == []
    assert len(trace.spans) == sum(1 + len(tree.phases) for tree in found), [span.name for span in trace.spans]
    for tree in found:
        _check_whole(tree)
    return found


def _check_whole(tree: Tree) -> None:
    assert tree.phases, "an llm_request without the plugin's spans"
    assert re.fullmatch(ORDER, " ".join(tree.order)), tree.order
    assert tree.request.start_ns <= tree.phases[0].start_ns
    assert tree.phases[-1].end_ns <= tree.request.end_ns
    for before, after in itertools.pairwise(tree.phases):
        assert before.end_ns == after.start_ns, f"{before.name} and {after.name} do not meet"
    ids = {span.attributes[names.REQUEST_ID] for span in (tree.request, *tree.phases)}
    assert len(ids) == 1, ids


def settle(server: ModelServer, receiver: Receiver) -> None:
    """Wait until everything that happened so far has been exported: spans leave an API server in order."""
    trace_id = new_trace_id()
    server.complete(trace_id, prompt="x", max_tokens=1).raise_for_status()
    assert len(receiver.wait(trace_id, 3)) == 3, "llm_request, queue and prefill of a request did not come"
