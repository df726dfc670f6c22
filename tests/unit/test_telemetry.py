from __future__ import annotations

import pytest

from llmtrace.telemetry import setup_tracing


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")


def test_the_resource_names_service_and_instance() -> None:
    attributes = setup_tracing("llm-d-epp", "random").provider.resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("llm-d-epp", "random")


def test_the_environment_overrules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=x,deployment=y")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    attributes = setup_tracing("llm-d-epp", "random").provider.resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"], attributes["deployment"]) == (
        "other",
        "x",
        "y",
    )


@pytest.mark.parametrize(
    ("variables", "processors"),
    [({}, 1), ({"OTEL_SDK_DISABLED": "true"}, 0), ({"OTEL_TRACES_EXPORTER": "none"}, 0)],
)
def test_exporting_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], processors: int
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    provider = setup_tracing("x", default_endpoint="http://127.0.0.1:9").provider
    assert len(provider._active_span_processor._span_processors) == processors
    provider.shutdown()
