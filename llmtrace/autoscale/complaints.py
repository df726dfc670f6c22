"""Failures of what a process depends on: counted each time, logged once."""

from __future__ import annotations

import logging

from prometheus_client import Counter

_log = logging.getLogger("llmtrace.autoscale")


class Complaints:
    """Gets the part that something depends on and what is wrong with it, '' when it is well."""

    def __init__(self, failures: Counter) -> None:
        self._failures = failures
        self._said: dict[str, str] = {}

    def __call__(self, part: str, said: str) -> None:
        """Take up a failure, or its end."""
        if said:
            self._failures.labels(part).inc()
            if self._said.get(part) != said:
                self._said[part] = said
                _log.warning("%s: %s", part, said)
        elif self._said.pop(part, None) is not None:
            _log.info("%s answers again", part)
