"""A trace in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format; times
are microseconds. Each service instance is a process; spans of one process that overlap without nesting get
threads of their own, as slices of one thread must nest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from llmtrace.traces.model import Span, Trace

Record = dict[str, Any]


def perfetto_json(traces: Sequence[Trace]) -> str:
    """The traces as one Trace Event Format document; links and remote parents become flow arrows."""
    return json.dumps({"traceEvents": list(_events(traces)), "displayTimeUnit": "ms"}, default=str)


def _events(traces: Sequence[Trace]) -> Iterator[Record]:
    spans = [span for trace in traces for span in trace.spans]
    processes = {sender: n for n, sender in enumerate(dict.fromkeys(map(_sender, spans)), 1)}
    threads = _threads(spans)
    for sender, pid in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": sender}}
    place: dict[tuple[str, str], Record] = {}
    for n, span in enumerate(spans):
        where = {"pid": processes[_sender(span)], "tid": threads[n], "ts": span.start_ns / 1e3}
        place.setdefault((span.trace_id, span.span_id), where)
        yield {
            "ph": "X",
            "name": span.name,
            "cat": span.kind,
            **where,
            "dur": max(span.end_ns - span.start_ns, 0) / 1e3,
            "args": {
                "trace_id": span.trace_id,
                "span_id": span.span_id,
                "status": f"{span.status} {span.status_message}".strip(),
                **span.attributes,
            },
        }
        for event in span.events:
            yield {
                "ph": "i",
                "s": "t",
                "name": event.name,
                **where,
                "ts": event.time_ns / 1e3,
                "args": dict(event.attributes),
            }
    number = 0
    for span in spans:
        here = place[span.trace_id, span.span_id]
        sources = [(link.trace_id, link.span_id, "link") for link in span.links]
        if span.parent_id is not None:
            sources.append((span.trace_id, span.parent_id, "parent"))
        for trace_id, span_id, name in sources:
            there = place.get((trace_id, span_id))
            if there is None or (name == "parent" and there["pid"] == here["pid"]):
                continue
            number += 1
            flow = {"name": name, "cat": name, "id": number}
            yield {"ph": "s", **flow, **there}
            yield {"ph": "f", "bp": "e", **flow, **here}


def _sender(span: Span) -> str:
    service = span.service or "unknown"
    return f"{service} {span.instance}" if span.instance else service


def _threads(spans: Sequence[Span]) -> list[int]:
    """A thread for each span: the first of its process where it nests in, or follows, whatever is there."""
    open_ends: dict[str, list[list[int]]] = {}
    threads = [0] * len(spans)
    for n in sorted(range(len(spans)), key=lambda i: (spans[i].start_ns, -spans[i].end_ns)):
        span = spans[n]
        lanes = open_ends.setdefault(_sender(span), [])
        for number, ends in enumerate(lanes, 1):
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
            if not ends or span.end_ns <= ends[-1]:
                ends.append(span.end_ns)
                threads[n] = number
                break
        else:
            lanes.append([span.end_ns])
            threads[n] = len(lanes)
    return threads
