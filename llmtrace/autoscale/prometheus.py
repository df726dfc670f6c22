"""Asks Prometheus for one number, by the rules of KEDA's Prometheus scaler."""

from __future__ import annotations

import math
from typing import Any

import httpx

from llmtrace.autoscale.scaled_object import PrometheusMetadata

TIMEOUT_S = 3.0
MOST_SAID = 200


class NoValueError(Exception):
    """The metric has no value; the message says why."""


async def value_of(client: httpx.AsyncClient, metadata: PrometheusMetadata) -> float:
    """The value of a query now.

    No sample, or one that is not finite, is 0 or, without ``ignoreNullValues``, no value. Raises NoValueError.
    """
    try:
        response = await client.get(
            f"{metadata.server_address.rstrip('/')}/api/v1/query", params={"query": metadata.query}, timeout=TIMEOUT_S
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoValueError(f"Prometheus does not answer ({str(error) or type(error).__name__})") from None
    try:
        document = response.json()
        if response.status_code != httpx.codes.OK or document["status"] != "success":
            raise NoValueError(
                f"Prometheus refused the query: {str(document.get('error', response.status_code))[:MOST_SAID]}"
            )
        return _number(document["data"], ignore_null=metadata.ignore_null_values)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise NoValueError(f"Prometheus answered {response.status_code} with something else than a result") from None


def _number(data: dict[str, Any], *, ignore_null: bool) -> float:
    samples = [data["result"]] if data["resultType"] == "scalar" else [entry["value"] for entry in data["result"]]
    if len(samples) > 1:
        raise NoValueError(f"the query gives {len(samples)} series; it must give one: sum or max them")
    value = float(samples[0][1]) if samples else math.nan
    if math.isfinite(value):
        return value
    if ignore_null:
        return 0.0
    raise NoValueError("the query gives no sample" if not samples else f"the query gives {value}")
