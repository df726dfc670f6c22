"""Sends a decision's trace, with what the trace store adds to it."""

from __future__ import annotations

from opentelemetry.sdk.trace.export import SpanExportResult

from llmtrace.autoscale import evidence
from llmtrace.autoscale.complaints import Complaints
from llmtrace.autoscale.record import DecisionRecord, ReplicaRecord
from llmtrace.autoscale.spans import DecisionSpans
from llmtrace.errors import UserError
from llmtrace.telemetry import Tracing
from llmtrace.traces.tempo import TempoClient


class Sender:
    """Sends decisions' traces. ``store`` is the trace store's URL, '' for none. Its methods block."""

    def __init__(self, tracing: Tracing, store: str, tell: Complaints) -> None:
        self._tracing = tracing
        self._store = TempoClient(store) if store else None
        self._tell = tell

    def send(self, decision: DecisionRecord) -> bool:
        """Export a decision's trace; False where the collector did not take it.

        A store that does not answer costs its links only.
        """
        exporter = self._tracing.exporter
        if exporter is None:
            return True
        found: evidence.Drivers | None = None
        if self._store is not None:
            try:
                found = evidence.drivers(self._store, decision)
                for replica in decision.replicas:
                    evidence.refine(self._store, replica)
                    evidence.drained(self._store, replica, decision.scaler_name.rpartition("/")[0])
                self._tell("store", "")
            except UserError as error:
                self._tell("store", str(error))
        spans = DecisionSpans(decision, self._tracing.provider.resource, found).spans()
        taken = exporter.export(list(spans)) is SpanExportResult.SUCCESS
        self._tell("collector", "" if taken else "it did not take a decision's trace, which is sent again")
        return taken

    def first_token(self, replica: ReplicaRecord, within_s: float) -> int | None:
        """When a replica that is ready gave its first token, in nanoseconds since the epoch; None where the store
        has no such request."""
        if self._store is None:
            return None
        try:
            return evidence.first_token(self._store, replica, within_s)
        except UserError as error:
            self._tell("store", str(error))
            return None
