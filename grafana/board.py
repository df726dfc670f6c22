"""What a dashboard is, apart from Grafana's JSON: rows of panels with queries, and what the tests must know of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

GREEN, YELLOW, RED = "green", "yellow", "red"

Thresholds = tuple[tuple[float, str], ...]


def limits(warn: float, bad: float) -> Thresholds:
    """Green below ``warn``, yellow from there, red from ``bad``; the other way round where ``bad`` is the smaller."""
    if bad < warn:
        return ((float("-inf"), RED), (bad, YELLOW), (warn, GREEN))
    return ((float("-inf"), GREEN), (warn, YELLOW), (bad, RED))


# Why a panel has no limits.
FLOW = "what comes is neither good nor bad"
COMPARED = "its series are there to be compared with each other"
YOURS = "what is much depends on what you run, and where"
COLOURS = "a heat map has a scale of colours"


@dataclass(frozen=True)
class Query:
    """A PromQL expression with Grafana's variables in it.

    ``may_be_empty`` says why no series may come on a healthy stack with traffic; without it, tests want data.
    """

    expr: str
    legend: str
    exemplars: bool = False
    may_be_empty: str = ""


@dataclass(frozen=True)
class Panel:
    """Metrics over time, or their last values. ``scenario`` is the only one in which there is data, if not in all.

    It has ``thresholds``, or ``no_limit`` says why not. In a heat map each series is a row, in the order of its legend,
    which must be a number. ``unit`` is one of Grafana's unit ids. ``endpoint_label`` is the label of the series that
    names a model server: they then link to the engine's dashboard.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    thresholds: Thresholds = ()
    no_limit: str = ""
    width: int = 12
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    scenario: str = ""
    endpoint_label: str = ""


@dataclass(frozen=True)
class TraceTable:
    """The newest traces that match a TraceQL query, in Tempo; one that the embedded store understands too."""

    title: str
    description: str
    traceql: str
    width: int = 12
    height: int = 9


@dataclass(frozen=True)
class JaegerTable:
    """The newest traces that Jaeger's own search finds. ``tags`` in logfmt, ``min_duration`` such as 2s."""

    title: str
    description: str
    service: str
    operation: str = ""
    tags: str = ""
    min_duration: str = ""
    width: int = 12
    height: int = 9


@dataclass(frozen=True)
class Note:
    """A text in Markdown."""

    title: str
    markdown: str
    width: int = 24
    height: int = 6


Item = Panel | TraceTable | JaegerTable | Note


@dataclass(frozen=True)
class Row:
    """A titled row of panels; a collapsed one asks nothing before it is opened."""

    title: str
    items: tuple[Item, ...]
    collapsed: bool = False


@dataclass(frozen=True)
class TextVariable:
    """A text that the user may change, such as a price."""

    name: str
    label: str
    description: str
    default: str


@dataclass(frozen=True)
class Board:
    """A dashboard. ``scenarios`` are those whose traffic fills it."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    scenarios: tuple[str, ...]
    variables: tuple[TextVariable, ...] = ()

    def items(self) -> Iterator[Item]:
        """Everything on it, in order."""
        for row in self.rows:
            yield from row.items

    def panels(self) -> Iterator[Panel]:
        """The panels with PromQL."""
        return (item for item in self.items() if isinstance(item, Panel))

    def trace_tables(self) -> Iterator[TraceTable]:
        """The tables with TraceQL."""
        return (item for item in self.items() if isinstance(item, TraceTable))
