"""What the vLLM plugin sends, against the registry."""

from __future__ import annotations

from llmtrace.semconv import engine
from llmtrace.semconv.definitions import registry


def test_every_name_of_the_plugin_is_declared() -> None:
    declared = registry()
    known = {
        *declared.attributes,
        *(span.name for span in declared.spans.values()),
        *(event.name for event in declared.events.values()),
        *(metric.name for metric in declared.metrics.values()),
    }
    values = {name: value for name, value in vars(engine).items() if name.isupper() and isinstance(value, str)}
    reasons = {engine.REASON_ADMISSION, engine.REASON_KV_LOADED}
    assert [name for name, value in values.items() if value not in known | reasons | {engine.SCOPE}] == []
    members = declared.attributes[engine.QUEUE_REASON].members
    assert members is not None
    assert {str(member) for member in members} >= reasons
