"""What a HorizontalPodAutoscaler says: what it saw, what it wants, and what holds it back.

A ScaledObject that owns the HPA is the scaler, and has the queries; else a VariantAutoscaling of the same target on
whose metrics the HPA scales; else the HPA itself. Names and meanings are those of autoscaling/v2 and of
kubernetes/pkg/controller/podautoscaler/horizontal.go, keda.sh/v1alpha1 and llmd.ai/v1alpha1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from llmtrace.autoscale import hpa as rules
from llmtrace.autoscale.kubernetes.objects import (
    Object,
    condition,
    get,
    name,
    namespace,
    nanoseconds,
    quantity,
    times,
    uid,
)
from llmtrace.autoscale.record import MetricRecord
from llmtrace.autoscale.scaled_object import KIND as SCALED_OBJECT
from llmtrace.semconv import attributes as a

HPA = "HorizontalPodAutoscaler"
VARIANT = "VariantAutoscaling"
UTILIZATION = "Utilization"
_RESCALED = "SucceededRescale"
"""Reason of AbleToScale in the status that tells of a change, and in no later one."""
_VARIANT_METRIC = re.compile(r"\b(wva|inferno)_\w+")
_KEDA_METRIC = re.compile(r"s(\d+)-")
_HELD = {a.LIMITED_MAX, a.LIMITED_UP, a.LIMITED_DOWN}
_NEW_SIZE = re.compile(r"New size: (\d+); reason: (.*)", re.DOTALL)
_FROM_TO = re.compile(r" from (\d+) to (\d+)")
_METRIC_REASON = re.compile(r"external metric ([^(\s]+)\(")


@dataclass(frozen=True)
class Target:
    """What is scaled."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True)
class Reading:
    """One version of an HPA. Times in nanoseconds since the epoch.

    ``scaled_ns`` is when it last changed the number of replicas, ``fresh`` whether this version is the one that
    tells of it: then ``current`` is the number before, and the metrics are those that drove it. ``told_ns`` is when
    the status was written. ``held`` is what holds the number back, '' for nothing. ``why`` is the reason of a
    VariantAutoscaling, ``owner`` the uid of the ScaledObject.
    """

    uid: str
    name: str
    scaler_kind: str
    scaler_name: str
    target: Target
    created_ns: int
    minimum: int
    maximum: int
    current: int
    desired: int
    scaled_ns: int | None
    told_ns: int | None
    fresh: bool
    metrics: tuple[MetricRecord, ...]
    metric: str | None
    recommended: int | None
    limit: str
    stabilization: str
    held: str
    why: str = ""
    owner: str = ""

    @property
    def reason(self) -> str:
        """The HPA's reason for a change, as it words it in its events."""
        if self.why:
            return self.why
        if self.current > self.maximum:
            return "Current number of replicas above Spec.MaxReplicas"
        if self.current < self.minimum:
            return "Current number of replicas below Spec.MinReplicas"
        if self.desired > self.current:
            return f"{self.metric} above target"
        return "All metrics below target" if self.desired < self.current else self.held or "no longer held back"


@dataclass(frozen=True)
class Rescale:
    """A change of the number of replicas that an event tells of: one of the HPA or the ScaledObject with this uid.

    ``metric`` is the external one that it names, ``current`` the number before where it says so.
    """

    uid: str
    time_ns: int
    desired: int
    reason: str
    metric: str | None = None
    current: int | None = None


def read(hpa: Object, scaled_objects: Iterable[Object], variants: Iterable[Object]) -> Reading:
    """Read a version of an HPA, together with the ScaledObjects and VariantAutoscalings that there are."""
    spec, status = get(hpa, "spec", default={}), get(hpa, "status", default={})
    target = target_of(hpa)
    owners = {get(o, "uid") for o in get(hpa, "metadata", "ownerReferences", default=[])}
    owner = next((s for s in scaled_objects if uid(s) in owners), None)
    current = int(get(status, "currentReplicas", default=0))
    able, limited = condition(hpa, "AbleToScale"), condition(hpa, "ScalingLimited")
    fresh = get(able, "reason") == _RESCALED
    metrics = _metrics(spec, status, current, owner)
    variant = None
    if any(_VARIANT_METRIC.search(f"{m.name} {m.query}") for m in metrics):
        variant = next((v for v in variants if target_of(v) == target), None)
    scaler = owner or variant or hpa
    proposals = [m for m in metrics if m.proposal is not None]
    largest = max(proposals, key=lambda m: m.proposal or 0, default=None)
    limit = str(get(limited, "reason")) if get(limited, "status") == "True" else a.NOT_LIMITED
    stabilization = str(get(able, "reason", default=""))
    if stabilization not in (a.UP_STABILIZED, a.DOWN_STABILIZED):
        stabilization = a.NOT_STABILIZED
    minimum = int(get(spec, "minReplicas", default=1))
    return Reading(
        uid=uid(hpa),
        name=name(hpa),
        scaler_kind=SCALED_OBJECT if owner else VARIANT if variant else HPA,
        scaler_name=f"{namespace(hpa)}/{name(scaler)}",
        target=target,
        created_ns=nanoseconds(get(hpa, "metadata", "creationTimestamp")) or 0,
        minimum=minimum,
        maximum=int(get(spec, "maxReplicas", default=1)),
        current=current,
        desired=int(get(status, "desiredReplicas", default=0)),
        scaled_ns=nanoseconds(get(status, "lastScaleTime")),
        told_ns=_told(hpa),
        fresh=fresh,
        metrics=metrics,
        metric=largest.name if largest else None,
        recommended=largest.proposal if largest and len(proposals) == len(metrics) else None,
        limit=limit,
        stabilization=stabilization,
        held=_held(hpa, owner, limit, stabilization, current <= minimum),
        owner=uid(owner) if owner else "",
        why=str(get(variant, "status", "desiredOptimizedAlloc", "lastUpdate", "reason", default="")) if variant else "",
    )


def rescales(event: Object) -> list[Rescale]:
    """The changes that an event tells of: SuccessfulRescale of an HPA, or KEDA's that it scaled from or to zero.

    Events of the same words are counted, and have the times of the first and the last of them.
    """
    about, message = get(event, "involvedObject", default={}), str(get(event, "message", default=""))
    uid_, metric, current = str(get(about, "uid", default="")), None, None
    if get(about, "kind") == HPA and (said := _NEW_SIZE.fullmatch(message)):
        desired, reason = int(said[1]), said[2]
        if named := _METRIC_REASON.search(reason):
            metric = named[1]
    elif get(about, "kind") == SCALED_OBJECT and (said := _FROM_TO.search(message)):
        current, desired, reason = int(said[1]), int(said[2]), message
    else:
        return []
    return [Rescale(uid_, t, desired, reason, metric, current) for t in sorted(times(event))]


def target_of(scaler: Object) -> Target:
    """What it scales."""
    reference = get(scaler, "spec", "scaleTargetRef", default={})
    return Target(
        str(get(reference, "kind", default="Deployment")), namespace(scaler), str(get(reference, "name", default=""))
    )


def _told(hpa: Object) -> int | None:
    """When the controller last wrote something new into the status."""
    times = [
        nanoseconds(get(entry, "time"))
        for entry in get(hpa, "metadata", "managedFields", default=[])
        if get(entry, "subresource") == "status"
    ]
    return max((t for t in times if t is not None), default=None)


def _held(hpa: Object, owner: Object | None, limit: str, stabilization: str, at_minimum: bool) -> str:
    active = condition(hpa, "ScalingActive")
    # At zero replicas it is KEDA that scales.
    if get(active, "status") == "False" and get(active, "reason") != "ScalingDisabled":
        return f"{get(active, 'reason')}: {get(active, 'message')}"
    fallback = condition(owner or {}, "Fallback")
    if get(fallback, "status") == "True":
        # KEDA serves a number of its own where a trigger fails; to the HPA it is a metric like any other.
        return f"Fallback: {get(fallback, 'message', default='')}"
    if limit in _HELD:
        return limit
    # At the minimum nothing would be taken away anyway.
    moot = stabilization == a.DOWN_STABILIZED and at_minimum
    return "" if moot or stabilization == a.NOT_STABILIZED else stabilization


# Metrics.


def _metrics(spec: Object, status: Object, current: int, owner: Object | None) -> tuple[MetricRecord, ...]:
    """The metrics of the spec, with the values that the status has for them."""
    values = {_key(m): m for m in get(status, "currentMetrics", default=[]) if isinstance(m, dict)}
    why = next(
        (
            str(get(c, "message"))
            for c in get(status, "conditions", default=[])
            if get(c, "type") == "ScalingActive" and get(c, "status") == "False"
        ),
        "the HorizontalPodAutoscaler has no value of it",
    )
    tolerance = {
        side: quantity(get(spec, "behavior", side, "tolerance")) or rules.TOLERANCE for side in ("scaleUp", "scaleDown")
    }
    bounds = rules.Spec(
        minimum=1,
        maximum=rules.MOST,
        targets=(rules.Target(name="-", value=1),),
        up=rules.SCALE_UP.model_copy(update={"tolerance": tolerance["scaleUp"]}),
        down=rules.SCALE_DOWN.model_copy(update={"tolerance": tolerance["scaleDown"]}),
    )
    found = (
        _metric(m, values.get(_key(m)), bounds, current, owner, why) for m in get(spec, "metrics", default=[]) if m
    )
    return tuple(m for m in found if m is not None)


def _key(metric: Object) -> tuple[str, str, str]:
    """What a metric is told from others by, in spec and status."""
    body = _body(metric)
    about = get(body, "metric", default=body)
    return (
        str(get(metric, "type")),
        str(get(about, "name", default="")),
        json.dumps(get(about, "selector"), sort_keys=True),
    )


def _body(metric: Object) -> Object:
    kind = str(get(metric, "type", default=""))
    body: Object = get(metric, kind[:1].lower() + kind[1:], default={})
    return body


def _metric(
    metric: Object, seen: Object | None, bounds: rules.Spec, current: int, owner: Object | None, why: str
) -> MetricRecord | None:
    body, told = _body(metric), get(_body(seen or {}), "current", default={})
    about = get(body, "metric", default=body)
    target = get(body, "target", default={})
    kind = str(get(target, "type", default=""))
    field = kind[:1].lower() + kind[1:] if kind != UTILIZATION else "averageUtilization"
    aim = quantity(get(target, field))
    if not aim:
        return None
    value = quantity(get(told, field))
    if value is not None and kind == "AverageValue":
        # The status has the average over the replicas before the change.
        value *= max(current, 1)
    label, query = _named(str(get(about, "name", default="")), get(about, "selector"), owner)
    proposal = None
    if value is not None:
        of: Literal["AverageValue", "Value"] = "AverageValue" if kind == "AverageValue" else "Value"
        proposal = rules.proposal(bounds, rules.Target(name=label, kind=of, value=aim), value, max(current, 1), current)
    return MetricRecord(
        name=label,
        query=query,
        target=aim,
        target_type=kind,
        value=value,
        proposal=proposal,
        failure="" if value is not None else why,
    )


def _named(metric: str, selector: Object | None, owner: Object | None) -> tuple[str, str]:
    """A metric's name and query.

    Those of the ScaledObject's trigger where there is one; else the metric's own and, in the form of a PromQL
    selector, what the HPA asks the metrics API for.
    """
    triggers = get(owner, "spec", "triggers", default=[]) if owner else []
    numbered = _KEDA_METRIC.match(metric)
    if numbered and int(numbered[1]) < len(triggers):
        trigger = triggers[int(numbered[1])]
        query = str(get(trigger, "metadata", "query", default=""))
        if query:
            return str(get(trigger, "name", default="") or metric), query
    labels: Mapping[str, str] = get(selector, "matchLabels", default={}) if selector else {}
    chosen = ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(labels.items()))
    return metric, f"{metric}{{{chosen}}}" if chosen else metric
