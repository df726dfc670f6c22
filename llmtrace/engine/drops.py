"""The metrics of requests and steps whose spans were dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Observation

from llmtrace.engine.meters import meter
from llmtrace.semconv import attributes as names


def publish(dropped: Callable[[], int], environment: Mapping[str, str] = os.environ) -> None:
    """Offer ``dropped()`` requests as a counter from now on; where metrics go nowhere, the count is only in the log."""
    about = "Requests without engine spans: their queue was full"
    _publish(names.ENGINE_DROPPED_METRIC, "{request}", about, dropped, {}, environment)


def publish_steps(
    dropped: Callable[[], int], rank: Mapping[str, str | int], environment: Mapping[str, str] = os.environ
) -> None:
    """The same of the steps of one rank."""
    about = "Steps without their rank's span: its queue was full, or the device never came to their end"
    _publish(names.STEPS_DROPPED_METRIC, "{step}", about, dropped, rank, environment)


def _publish(
    metric: str,
    unit: str,
    about: str,
    dropped: Callable[[], int],
    attributes: Mapping[str, str | int],
    environment: Mapping[str, str],
) -> None:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(dropped(), attributes)]

    meter(environment).create_observable_counter(metric, [observe], unit, about)
