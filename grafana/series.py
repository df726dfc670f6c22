"""The names that the registry's metrics and attributes have in Prometheus."""

from __future__ import annotations

import re

from llmtrace.semconv.definitions import MetricDefinition, Registry

HISTOGRAM = ("_bucket", "_sum", "_count")
UNITS = {"s": "_seconds", "By": "_bytes"}
OWN_LABELS = frozenset({"__name__", "le", "otel_metric_overflow"})
"""Labels of Prometheus itself, and OpenTelemetry's of what is over the limit of series."""


def series(metric: MetricDefinition) -> set[str]:
    """The names of a metric's series.

    A name with dots is OpenTelemetry's, and translated as Prometheus does it (UnderscoreEscapingWithSuffixes); any
    other is a Prometheus name already.
    """
    name = metric.name
    if "." in name:
        name = label(name) + UNITS.get(metric.unit, "") + ("_total" if metric.instrument == "counter" else "")
    return {name + part for part in HISTOGRAM} if metric.instrument == "histogram" else {name}


def label(attribute: str) -> str:
    """The label that an attribute becomes."""
    return re.sub(r"[^a-zA-Z0-9_:]", "_", attribute)


def known_series(registry: Registry) -> set[str]:
    """Every name that a series of a declared metric can have."""
    return {name for metric in registry.metrics.values() for name in series(metric)}


def known_labels(registry: Registry) -> set[str]:
    """Every label that a declared attribute becomes, and those of Prometheus."""
    return {label(attribute) for attribute in registry.attributes} | OWN_LABELS
