"""The metric of requests whose engine spans were dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Observation

from llmtrace.engine.meters import meter
from llmtrace.semconv import attributes as names


def publish(dropped: Callable[[], int], environment: Mapping[str, str] = os.environ) -> None:
    """Offer ``dropped()`` as a counter from now on; where metrics go nowhere, the count is only in the log."""

    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(dropped())]

    meter(environment).create_observable_counter(
        names.ENGINE_DROPPED_METRIC, [observe], "{request}", "Requests without engine spans: their queue was full"
    )
