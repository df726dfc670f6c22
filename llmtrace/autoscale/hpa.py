"""The HorizontalPodAutoscaler's algorithm for external metrics, without Kubernetes: numbers in, a decision out.

Source: kubernetes, pkg/controller/podautoscaler (horizontal.go, replica_calculator.go) and the API autoscaling/v2.
Its words are kept for conditions and reasons. What it does for resource and pod metrics is not here: llm-d scales on
external ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmtrace.semconv import attributes as a

TOLERANCE = 0.1
"""How far from 1 the ratio of value to target may be without a change."""
DOWN_WINDOW_S = 300.0
"""The scale-down stabilisation window where none is given: the controller manager's default."""
MOST = 2**31 - 1


class Frozen(BaseModel):
    """Base of what is decided on and what is kept."""

    model_config = ConfigDict(frozen=True)


class Policy(Frozen):
    """How much may change in ``period_s`` seconds: ``value`` replicas, or ``value`` percent of them."""

    kind: Literal["Pods", "Percent"]
    value: int = Field(gt=0)
    period_s: float = Field(gt=0, le=1800)


class Rules(Frozen):
    """The behaviour in one direction. ``select`` says which policy counts: the one that allows the largest change
    (Max), the smallest (Min), or no change at all (Disabled). ``window_s`` is the stabilisation window."""

    window_s: float = Field(ge=0, le=3600)
    policies: tuple[Policy, ...] = Field(min_length=1)
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float = Field(default=TOLERANCE, ge=0)


SCALE_UP = Rules(
    window_s=0, policies=(Policy(kind="Pods", value=4, period_s=15), Policy(kind="Percent", value=100, period_s=15))
)
SCALE_DOWN = Rules(window_s=DOWN_WINDOW_S, policies=(Policy(kind="Percent", value=100, period_s=15),))


class Target(Frozen):
    """A metric's target: ``AverageValue`` for each replica, ``Value`` for all of them together."""

    name: str
    kind: Literal["AverageValue", "Value"] = "AverageValue"
    value: float = Field(gt=0)


class Spec(Frozen):
    """What an HPA is told."""

    minimum: int = Field(ge=1)
    maximum: int = Field(ge=1)
    targets: tuple[Target, ...] = Field(min_length=1)
    up: Rules = SCALE_UP
    down: Rules = SCALE_DOWN


class Moment(Frozen):
    """A recommendation, or a change of the number of replicas, at a time in seconds since the epoch."""

    time_s: float
    replicas: int


class History(Frozen):
    """What an HPA remembers: its recommendations, and what it changed (amounts, all positive)."""

    recommendations: tuple[Moment, ...] = ()
    added: tuple[Moment, ...] = ()
    removed: tuple[Moment, ...] = ()


class Stabilization(StrEnum):
    """Reasons of the condition AbleToScale."""

    READY = a.NOT_STABILIZED
    UP = a.UP_STABILIZED
    DOWN = a.DOWN_STABILIZED


class Limit(StrEnum):
    """Reasons of the condition ScalingLimited."""

    NONE = a.NOT_LIMITED
    UP = a.LIMITED_UP
    DOWN = a.LIMITED_DOWN
    MAXIMUM = a.LIMITED_MAX
    MINIMUM = a.LIMITED_MIN


@dataclass(frozen=True)
class Verdict:
    """A decision. ``recommended`` is what the metrics ask for, None where they cannot be used; ``proposals`` are
    those of the single metrics, and ``metric`` the name of the one that counted."""

    current: int
    desired: int
    recommended: int | None
    reason: str
    metric: str | None = None
    proposals: Mapping[str, int] | None = None
    stabilization: Stabilization = Stabilization.READY
    limit: Limit = Limit.NONE


def decide(
    spec: Spec, history: History, now_s: float, current: int, ready: int, values: Mapping[str, float]
) -> tuple[Verdict, History]:
    """Decide on the number of replicas; returns the decision and what to remember.

    ``current`` is the number that was asked for last, ``ready`` how many of them serve. ``values`` are the metrics by
    name; one that could not be had is absent. The change itself is remembered by :func:`changed`, once it was made.
    """
    if not history.recommendations:
        history = history.model_copy(update={"recommendations": (Moment(time_s=now_s, replicas=current),)})
    if current == 0:
        return Verdict(0, 0, None, "scaling is disabled since the replica count of the target is zero"), history
    if current > spec.maximum:
        reason = "Current number of replicas above Spec.MaxReplicas"
        return Verdict(current, spec.maximum, None, reason, limit=Limit.MAXIMUM), history
    if current < spec.minimum:
        reason = "Current number of replicas below Spec.MinReplicas"
        return Verdict(current, spec.minimum, None, reason, limit=Limit.MINIMUM), history
    proposals = {t.name: proposal(spec, t, values[t.name], current, ready) for t in spec.targets if t.name in values}
    metric, wanted = _largest(proposals)
    missing = [t.name for t in spec.targets if t.name not in values]
    if metric is None or (missing and wanted < current):
        # With a metric unknown, nothing may be taken away; more may still be added.
        return Verdict(current, current, None, f"no value of {', '.join(missing)}", metric, proposals), history
    stable, stabilization = _stabilized(spec, history, now_s, current, wanted)
    desired, limit = _limited(spec, history, now_s, current, stable)
    reason = "desired count matches the current one"
    if wanted > current:
        reason = f"{metric} above target"
    elif wanted < current:
        reason = "All metrics below target"
    verdict = Verdict(current, desired, wanted, reason, metric, proposals, stabilization, limit)
    keep = now_s - max(spec.up.window_s, spec.down.window_s)
    remembered = (*(m for m in history.recommendations if m.time_s >= keep), Moment(time_s=now_s, replicas=wanted))
    return verdict, history.model_copy(update={"recommendations": remembered})


def changed(spec: Spec, history: History, now_s: float, before: int, after: int) -> History:
    """What to remember when the number of replicas was changed; changes that no policy looks back to are forgotten."""
    if after == before:
        return history
    longest = max(policy.period_s for rules in (spec.up, spec.down) for policy in rules.policies)
    moment = Moment(time_s=now_s, replicas=abs(after - before))
    added = _recent(history.added, now_s - longest)
    removed = _recent(history.removed, now_s - longest)
    if after > before:
        added = (*added, moment)
    else:
        removed = (*removed, moment)
    return history.model_copy(update={"added": added, "removed": removed})


def _recent(moments: Iterable[Moment], since_s: float) -> tuple[Moment, ...]:
    return tuple(m for m in moments if m.time_s > since_s)


def proposal(spec: Spec, target: Target, value: float, current: int, ready: int) -> int:
    """The replicas that one metric asks for. Numbers are in thousandths, cut off, as KEDA and the API have them."""
    milli, wanted = int(value * 1000), int(target.value * 1000) or 1
    if target.kind == "AverageValue":
        ratio = milli / (wanted * current)
        return current if _tolerated(spec, ratio) else _ceil(milli / wanted)
    ratio = milli / wanted
    return current if _tolerated(spec, ratio) else _ceil(ratio * ready)


def _tolerated(spec: Spec, ratio: float) -> bool:
    return 1.0 - spec.down.tolerance <= ratio <= 1.0 + spec.up.tolerance


def _ceil(replicas: float) -> int:
    return min(math.ceil(replicas), MOST)


def _largest(proposals: Mapping[str, int]) -> tuple[str | None, int]:
    """The first metric that asks for the most replicas."""
    if not proposals:
        return None, 0
    name = max(proposals, key=lambda key: proposals[key])
    return name, proposals[name]


def _stabilized(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> tuple[int, Stabilization]:
    """The recommendation within what the windows saw.

    Up no further than the lowest, down no further than the highest.
    """
    recent_up = [m.replicas for m in history.recommendations if m.time_s > now_s - spec.up.window_s]
    recent_down = [m.replicas for m in history.recommendations if m.time_s > now_s - spec.down.window_s]
    floor, ceiling = min([wanted, *recent_up]), max([wanted, *recent_down])
    stable = min(max(current, floor), ceiling)
    if stable == wanted:
        return stable, Stabilization.READY
    return stable, Stabilization.UP if wanted >= current else Stabilization.DOWN


def _limited(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> tuple[int, Limit]:
    """The recommendation within the policies and the bounds."""
    if wanted > current:
        allowed = max(_up_limit(spec.up, history, now_s, current), current)
        most, limit = (allowed, Limit.UP) if allowed < spec.maximum else (spec.maximum, Limit.MAXIMUM)
        return (most, limit) if wanted > most else (wanted, Limit.NONE)
    if wanted < current:
        allowed = min(_down_limit(spec.down, history, now_s, current), current)
        fewest, limit = (allowed, Limit.DOWN) if allowed > spec.minimum else (spec.minimum, Limit.MINIMUM)
        return (fewest, limit) if wanted < fewest else (wanted, Limit.NONE)
    return wanted, Limit.NONE


def _up_limit(rules: Rules, history: History, now_s: float, current: int) -> int:
    if rules.select == "Disabled":
        return current
    allowed = []
    for policy in rules.policies:
        start = _at_start(policy, history, now_s, current)
        allowed.append(start + policy.value if policy.kind == "Pods" else math.ceil(start * (1 + policy.value / 100)))
    return max(allowed) if rules.select == "Max" else min(allowed)


def _down_limit(rules: Rules, history: History, now_s: float, current: int) -> int:
    if rules.select == "Disabled":
        return current
    allowed = []
    for policy in rules.policies:
        start = _at_start(policy, history, now_s, current)
        allowed.append(start - policy.value if policy.kind == "Pods" else int(start * (1 - policy.value / 100)))
    return min(allowed) if rules.select == "Max" else max(allowed)


def _at_start(policy: Policy, history: History, now_s: float, current: int) -> int:
    """The replicas at the start of the policy's period."""
    since = now_s - policy.period_s
    added = sum(m.replicas for m in history.added if m.time_s > since)
    removed = sum(m.replicas for m in history.removed if m.time_s > since)
    return current - added + removed
