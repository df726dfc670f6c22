"""Kubernetes' objects as their JSON: paths, times, quantities, selectors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kubernetes.utils.quantity import parse_quantity

Object = dict[str, Any]
"""An object as the API server sends it."""


def get(found: Any, *path: str, default: Any = None) -> Any:
    """What is at a path of keys; ``default`` where something on the way is absent or null."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return default if found is None else found


def name(found: Object) -> str:
    """Its name."""
    return str(get(found, "metadata", "name", default=""))


def namespace(found: Object) -> str:
    """Its namespace."""
    return str(get(found, "metadata", "namespace", default=""))


def uid(found: Object) -> str:
    """Its uid."""
    return str(get(found, "metadata", "uid", default=""))


def nanoseconds(text: object) -> int | None:
    """A Time or MicroTime in nanoseconds since the epoch; None where it is none."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    whole = int(moment.replace(microsecond=0).timestamp())
    return whole * 10**9 + moment.microsecond * 1000


def times(event: Object) -> set[int]:
    """When an event first and last happened, in nanoseconds since the epoch.

    Those of core/v1 have whole seconds; those of events.k8s.io, which core/v1 shows as well, have microseconds.
    """
    told = ("firstTimestamp",), ("lastTimestamp",), ("eventTime",), ("series", "lastObservedTime")
    return {t for path in told if (t := nanoseconds(get(event, *path))) is not None}


def micro_time(seconds: float) -> str:
    """A time in seconds since the epoch as a MicroTime."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def quantity(text: object) -> float | None:
    """A quantity such as 500m, 2 or 1Ki; None where it is none."""
    if not isinstance(text, str | int | float):
        return None
    try:
        return float(parse_quantity(str(text)))
    except ValueError:
        return None


def condition(found: Object, kind: str) -> Object:
    """The condition of this type in the status; empty where there is none."""
    conditions = get(found, "status", "conditions", default=[])
    return next((c for c in conditions if get(c, "type") == kind), {})


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector matches; an empty one matches nothing, as no workload may have it."""
    wanted = get(selector, "matchLabels", default={})
    expressions = get(selector, "matchExpressions", default=[])
    if not wanted and not expressions:
        return False
    return all(labels.get(k) == v for k, v in wanted.items()) and all(_holds(e, labels) for e in expressions)


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    key, values = get(expression, "key", default=""), get(expression, "values", default=[])
    match get(expression, "operator"):
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False
