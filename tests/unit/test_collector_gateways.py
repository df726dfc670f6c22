"""Agents of several gateways: all spans of a trace come to the same real gateway, which decides about it."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

from collecting import backend, collecting, spans_of, wait_for
from loopback import until
from opentelemetry.proto.trace.v1.trace_pb2 import Status

TRACES = 40
ERROR = Status(code=Status.STATUS_CODE_ERROR)
SLOW = {"DECISION_WAIT": "8s", "DECISION_WAIT_AFTER_ROOT": "5s"}
"""The error comes before the decision, on a busy machine too."""
PARENT = b"\x09" * 8


def static(ports: list[int]) -> str:
    """The gateways by their addresses, without a Kubernetes that knows them."""
    hostnames = json.dumps([f"127.0.0.1:{port}" for port in ports])
    return f"exporters: {{loadbalancing/gateways: {{resolver: {{k8s: null, static: {{hostnames: {hostnames}}}}}}}}}"


def test_a_trace_is_decided_as_a_whole(tmp_path: Path) -> None:
    """The root comes first and is worth nothing; the error comes later, by another request, and keeps both."""
    folders = [tmp_path / name for name in ("one", "two", "three", "agent")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        store = stack.enter_context(backend())
        gateways = [
            stack.enter_context(collecting("gateway", folder, store, SLOW | {"SAMPLED_PERCENT": "0"}))
            for folder in folders[:3]
        ]
        more = static([gateway.grpc_port for gateway in gateways])
        agent = stack.enter_context(collecting("agent of several gateways", folders[3], store, more=more))
        traces = [os.urandom(16) for _ in range(TRACES)]
        assert all(agent.send(spans_of({"trace": trace, "name": "ingress"})) for trace in traces)
        for trace in traces:
            assert agent.send(spans_of({"trace": trace, "parent_span_id": PARENT, "status": ERROR}))
        wait_for(store, {*traces})
        spans = store.spans()
        decided = [
            float(line.split()[-1])
            for gateway in gateways
            for line in gateway.page().splitlines()
            if line.startswith("otelcol_processor_tail_sampling_global_count_traces_sampled_total")
        ]
    assert len(spans) == 2 * TRACES
    assert sum(decided) == TRACES
    assert len(decided) == len(gateways), "each gateway got some"


def test_spans_for_a_gateway_that_is_away_wait_on_disk(tmp_path: Path) -> None:
    with backend() as one, backend() as two:
        more = static([one.grpc_port, two.grpc_port])
        with collecting("agent of several gateways", tmp_path, one, more=more) as agent:
            traces = {os.urandom(16) for _ in range(TRACES)}
            two.stop()
            assert all(agent.send(spans_of({"trace": trace})) for trace in traces)
            agent.kill()
            agent.start()
            two.start()

            def arrived() -> bool:
                return traces == {span.trace_id for gateway in (one, two) for span in gateway.spans()}

            until(arrived, "every span", 30, poll_s=0.2)
        assert one.spans()
        assert two.spans()
        assert not {s.trace_id for s in one.spans()} & {s.trace_id for s in two.spans()}
