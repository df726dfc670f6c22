"""Which decisions there were: each once, whatever is told twice, late, out of order, or not at all.

A change of the number of replicas is told in two ways: by the HPA's status (lastScaleTime, the numbers, the metrics;
only the last change) and by an event (time, the new number, the reason; each change, for an hour, but events may be
dropped). KEDA's changes from and to zero are told by its events alone. Either is enough. Two tellings are of the same
decision where their times agree: an HPA decides once in its sync period (15 s by default) and writes the event and
the status one after the other. Seconds are all that either has.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, Field

from llmtrace.autoscale.hpa import Frozen
from llmtrace.autoscale.kubernetes.scalers import Reading, Rescale, Target
from llmtrace.autoscale.record import DecisionRecord
from llmtrace.semconv import attributes as a

SECOND = 10**9
SAME_S = 1
"""Tellings this close together are of one decision: shorter than any sync period in use."""
SAME_SIZE_S = 5
"""So are those of the same new number this close together, with no other decision between."""
KEPT_S = 7200
"""How long after it a decision may still be found, and for how long it is remembered as known: longer than events
last."""
NOT_SEEN = "the status of that moment was not seen"


class Watched(DecisionRecord):
    """A decision of a scaler in the cluster. ``detailed`` says whether the status that tells of it was seen; ``uids``
    are those of its replicas' pods, by the replica's place."""

    hpa: str
    target: Target
    resolution_ms: float = 1000.0
    detailed: bool = False
    uids: list[list[str]] = Field(default_factory=list)

    @property
    def wanted(self) -> int:
        """How many replicas it starts or stops."""
        return abs(self.desired - self.current)


class Known(Frozen):
    """A decision that is known."""

    id: str
    time_ns: int
    desired: int


class ScalerState(BaseModel):
    """What is kept of an HPA. ``size`` is the number of replicas that it had last; ``held`` what held it back."""

    known: list[Known] = Field(default_factory=list)
    size: int | None = None
    held: str = ""


class State(BaseModel):
    """What survives a restart, and cannot be had from the API server again: which decisions are known, and those whose
    traces were not sent yet, with the metrics of their moment. What was decided before ``since_ns`` is history."""

    since_ns: int
    scalers: dict[str, ScalerState] = Field(default_factory=dict)
    decisions: list[Watched] = Field(default_factory=list)


@dataclass(frozen=True)
class Prices:
    """What a decision is told of beside the scaler: how old the metrics' samples may be, and what a replica costs."""

    window_ms: float = 30_000.0
    accelerators: float = 1.0
    price_per_hour: float = 0.0


class Ledger:
    """Adds to a state what readings and events tell."""

    def __init__(self, state: State, prices: Prices) -> None:
        self.state = state
        self._prices = prices
        self._readings: dict[str, Reading] = {}

    def take(self, reading: Reading, now_ns: int, ready: int, accelerators: float | None = None) -> Watched | None:
        """Take up a version of an HPA; returns the decision that it made known, if any."""
        kept = self.state.scalers.setdefault(reading.uid, ScalerState())
        found, scaled = None, reading.scaled_ns
        counts = scaled is not None and self._counts(scaled, reading, now_ns)
        known = self._known(kept, scaled or 0, reading.desired)
        if scaled is not None and counts and known is None:
            found = self._change(reading, kept, scaled, reading.desired, ready)
        elif not reading.fresh:
            found = self._hold(reading, kept, now_ns, ready)
        elif known is not None and (decision := self._open(known.id)) is not None and not decision.detailed:
            self._detail(decision, reading)
        if found is not None and accelerators is not None:
            found.accelerators = accelerators
        kept.held = reading.held
        if not reading.fresh:
            kept.size = reading.current
        self._readings |= {reading.uid: reading} | ({reading.owner: reading} if reading.owner else {})
        return found

    def take_event(
        self, rescale: Rescale, now_ns: int, ready: int, accelerators: float | None = None
    ) -> Watched | None:
        """Take up a change that an event tells of; returns the decision that it made known, if any.

        Before its HPA was read, nothing is known of the scaler: it has to be taken up again then.
        """
        reading = self._readings.get(rescale.uid)
        if reading is None or not self._counts(rescale.time_ns, reading, now_ns):
            return None
        kept = self.state.scalers[reading.uid]
        known = self._known(kept, rescale.time_ns, rescale.desired)
        if known is not None:
            decision = self._open(known.id)
            if decision is not None:
                _explain(decision, rescale)
            return None
        found = self._change(reading, kept, rescale.time_ns, rescale.desired, ready)
        if rescale.current is not None:
            found.current, found.direction = rescale.current, _direction(rescale.current, rescale.desired)
        _explain(found, rescale)
        if accelerators is not None:
            found.accelerators = accelerators
        return found

    def target(self, scaler: str) -> Target | None:
        """What an HPA or the ScaledObject that owns it scales; None where it was not read yet."""
        reading = self._readings.get(scaler)
        return reading.target if reading else None

    def later(self, decision: Watched) -> Known | None:
        """The next change of the same scaler."""
        kept = self.state.scalers.get(decision.hpa, ScalerState())
        return next((k for k in kept.known if k.time_ns > decision.time_ns), None)

    def forget(self, now_ns: int, present: set[str]) -> None:
        """Let go of decisions that cannot be told again, and of HPAs that are no longer ``present``."""
        since = now_ns - 2 * KEPT_S * SECOND
        for hpa, kept in list(self.state.scalers.items()):
            # The last one stays: it says how many replicas there were before the next.
            old = [k for k in kept.known[:-1] if k.time_ns < since]
            kept.known = kept.known[len(old) :]
            if hpa not in present and all(k.time_ns < since for k in kept.known):
                del self.state.scalers[hpa]

    # Decisions.

    def _counts(self, time_ns: int, reading: Reading, now_ns: int) -> bool:
        """Whether a decision of this time is to be traced: neither history nor another HPA's."""
        return time_ns >= max(self.state.since_ns, now_ns - KEPT_S * SECOND, reading.created_ns)

    def _known(self, kept: ScalerState, time_ns: int, desired: int) -> Known | None:
        near = min(kept.known, key=lambda k: abs(k.time_ns - time_ns), default=None)
        if near is None:
            return None
        apart = abs(near.time_ns - time_ns)
        same = apart <= SAME_S * SECOND or (near.desired == desired and apart <= SAME_SIZE_S * SECOND)
        return near if same else None

    def _open(self, decision_id: str) -> Watched | None:
        return next((d for d in self.state.decisions if d.id == decision_id), None)

    def _change(self, reading: Reading, kept: ScalerState, time_ns: int, desired: int, ready: int) -> Watched:
        before = [k for k in kept.known if k.time_ns < time_ns]
        current = before[-1].desired if before else kept.size
        decision = self._record(reading, time_ns, desired, desired if current is None else current, ready)
        if reading.fresh and reading.scaled_ns is not None and abs(reading.scaled_ns - time_ns) <= SAME_S * SECOND:
            self._detail(decision, reading)
        kept.known = sorted(
            [*kept.known, Known(id=decision.id, time_ns=time_ns, desired=desired)], key=lambda k: k.time_ns
        )
        self.state.decisions.append(decision)
        # One that came to be known before it began from another number than was thought.
        after = next((k for k in kept.known if k.time_ns > time_ns), None)
        following = self._open(after.id) if after else None
        if following is not None and not following.detailed:
            following.current, following.direction = desired, _direction(desired, following.desired)
        return decision

    def _hold(self, reading: Reading, kept: ScalerState, now_ns: int, ready: int) -> Watched | None:
        """A decision that leaves the number as it is, where what holds it back is no longer the same."""
        told = reading.told_ns or 0
        passing = not reading.held and kept.held == a.DOWN_STABILIZED
        if reading.held == kept.held or passing or not self._counts(told, reading, now_ns):
            return None
        decision = self._record(reading, told, reading.current, reading.current, ready, hold=True)
        if self._open(decision.id) is not None:
            return None
        self._detail(decision, reading)
        self.state.decisions.append(decision)
        return decision

    def _record(
        self, reading: Reading, time_ns: int, desired: int, current: int, ready: int, *, hold: bool = False
    ) -> Watched:
        what = "hold" if hold else f"{desired}"
        return Watched(
            id=f"{reading.target.namespace}/{reading.name}-{reading.uid[:8]}-{time_ns // SECOND}-{what}",
            hpa=reading.uid,
            target=reading.target,
            scaler_kind=reading.scaler_kind,
            scaler_name=reading.scaler_name,
            time_ns=time_ns,
            direction=_direction(current, desired),
            reason=f"new size: {desired}",
            metric=None,
            metrics=[
                m.model_copy(update={"value": None, "proposal": None, "failure": NOT_SEEN}) for m in reading.metrics
            ],
            current=current,
            ready=ready,
            recommended=None,
            desired=desired,
            minimum=reading.minimum,
            maximum=reading.maximum,
            stabilization=a.NOT_STABILIZED,
            limit=a.NOT_LIMITED,
            window_ms=self._prices.window_ms,
            accelerators=self._prices.accelerators,
            price_per_hour=self._prices.price_per_hour,
        )

    @staticmethod
    def _detail(decision: Watched, reading: Reading) -> None:
        """Fill in what only the status of the decision's moment has."""
        decision.detailed = True
        decision.current, decision.desired = reading.current, reading.desired if reading.fresh else reading.current
        decision.direction = _direction(decision.current, decision.desired)
        decision.metrics = list(reading.metrics)
        decision.metric = decision.metric or reading.metric
        decision.recommended = reading.recommended
        decision.limit, decision.stabilization = reading.limit, reading.stabilization
        if decision.reason.startswith("new size"):
            decision.reason = reading.reason


def _explain(decision: Watched, rescale: Rescale) -> None:
    """Take the reason from the HPA's own event, and the metric that it names."""
    if decision.scaler_kind != "VariantAutoscaling":
        decision.reason = rescale.reason
    named = [m.name for m in decision.metrics if rescale.metric and _is(m.name, m.query, rescale.metric)]
    if named:
        decision.metric = named[0]


def _is(label: str, query: str, metric: str) -> bool:
    return label == metric or query == metric or query.startswith(metric + "{")


def _direction(current: int, desired: int) -> str:
    return a.SCALE_UP if desired > current else a.SCALE_DOWN if desired < current else a.SCALE_HOLD
