"""What the scaler reads: ScaledObjects, command lines, and answers of Prometheus."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from scaling import scaled_object

from llmtrace.autoscale import __main__
from llmtrace.autoscale import scaled_object as reader
from llmtrace.autoscale.hpa import SCALE_DOWN, SCALE_UP
from llmtrace.autoscale.prometheus import NoValueError, value_of
from llmtrace.autoscale.scaled_object import PrometheusMetadata
from llmtrace.errors import UserError

LLM_D = """
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {name: optimized-baseline-keda-epp, labels: {app: x}}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: optimized-baseline-nvidia-gpu-vllm-decode}
  minReplicaCount: 1
  maxReplicaCount: 8
  pollingInterval: 15
  advanced:
    horizontalPodAutoscalerConfig:
      name: keda-hpa-optimized-baseline
      behavior:
        scaleUp: {stabilizationWindowSeconds: 0}
        scaleDown: {stabilizationWindowSeconds: 300, policies: [{type: Pods, value: 1, periodSeconds: 60}]}
  triggers:
    - type: prometheus
      name: epp-queue-size
      metricType: AverageValue
      metadata:
        serverAddress: http://prometheus:9090
        query: sum(llm_d_epp_flow_control_queue_size{namespace="a",service="b",model_name="Qwen/Qwen3-32B"})
        threshold: "1"
    - type: prometheus
      name: epp-running-requests
      metricType: AverageValue
      metadata:
        serverAddress: http://prometheus:9090
        query: sum(llm_d_epp_request_running{namespace="a",service="b",model_name="Qwen/Qwen3-32B"})
        threshold: "16"
"""
"""As llm-d's guide workload-autoscaling has it (keda-epp-queue)."""


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "scaled-object.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_llm_ds_scaled_object_is_what_its_hpa_is_told(tmp_path: Path) -> None:
    spec = reader.load(written(tmp_path, LLM_D)).hpa()
    assert (spec.minimum, spec.maximum) == (1, 8)
    assert [(t.name, t.kind, t.value) for t in spec.targets] == [
        ("epp-queue-size", "AverageValue", 1.0),
        ("epp-running-requests", "AverageValue", 16.0),
    ]
    assert spec.up == SCALE_UP
    assert spec.down.window_s == 300
    assert [(p.kind, p.value, p.period_s) for p in spec.down.policies] == [("Pods", 1, 60)]


def test_without_behaviour_kubernetes_defaults_apply(tmp_path: Path) -> None:
    content = scaled_object("http://p:9090", advanced={})
    spec = reader.load(written(tmp_path, content)).hpa()
    assert (spec.up, spec.down) == (SCALE_UP, SCALE_DOWN)


def changed(path: list[str | int], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(scaled_object("http://p:9090"))
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is no YAML"),
        ("", "wrong at the top level"),
        (changed(["kind"], "Deployment"), "wrong at kind"),
        (changed(["spec", "idleReplicaCount"], 0), "spec.idleReplicaCount: the local scaler has no such setting"),
        (changed(["spec", "minReplicaCount"], 0), "wrong at spec.minReplicaCount"),
        (changed(["spec", "minReplicaCount"], 9), "maxReplicaCount is 3, less than minReplicaCount 9"),
        (changed(["spec", "triggers"], []), "wrong at spec.triggers"),
        (changed(["spec", "triggers", 0, "type"], "cron"), "wrong at spec.triggers.0.type"),
        (changed(["spec", "triggers", 0, "name"], "running"), "two triggers of the same name"),
        (changed(["spec", "triggers", 0, "metadata", "threshold"], "0"), "must be a number above 0"),
        (changed(["spec", "triggers", 0, "metadata", "serverAddress"], "p:1"), "metadata.serverAddress"),
        (changed(["spec", "triggers", 0, "metricType"], "Utilization"), "wrong at spec.triggers.0.metricType"),
        (
            changed(
                ["spec", "advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleUp", "policies"],
                [{"type": "Pods", "value": 0, "periodSeconds": 15}],
            ),
            "value: Input should be greater than 0",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        reader.load(written(tmp_path, content))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        reader.load(tmp_path / "none.yaml")


def flags(tmp_path: Path, **changes: str) -> list[str]:
    replicas = tmp_path / "replicas.yaml"
    replicas.write_text('endpoints: [{name: vllm-0, address: 127.0.0.1, port: "8000"}]')
    values = {
        "config": str(written(tmp_path, LLM_D)),
        "replicas": str(replicas),
        "endpoints": str(tmp_path / "endpoints.yaml"),
        "supervisor": str(tmp_path / "supervisor.sock"),
        "state": str(tmp_path / "state.json"),
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_the_command_line(tmp_path: Path) -> None:
    found, socket = __main__.options(flags(tmp_path, period="5s", sample_age="2s", ready_timeout="7m", price="2.5"))
    assert socket == tmp_path / "supervisor.sock"
    assert (found.period_s, found.window_s, found.patience.ready_s, found.price) == (5, 2, 420, 2.5)
    assert (found.host, found.settle_s, found.patience.drain_s) == ("127.0.0.1", 30, 60)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"price": "dear"}, "'dear' is no number"),
        ({"period": "soon"}, "'soon' is no duration"),
        ({"perio": "5s"}, "--perio"),
    ],
)
def test_a_wrong_command_line(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        __main__.options(flags(tmp_path, **changes))
    assert words in str(caught.value)


def test_more_replicas_asked_for_than_described_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(flags(tmp_path)) == 2
    assert "maxReplicaCount is 8, and there are 1 replicas to start" in capsys.readouterr().err


def prometheus(answer: Any, status: int = 200) -> httpx.AsyncClient:
    body = answer if isinstance(answer, str) else json.dumps(answer)
    return httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(status, text=body)))


def vector(*values: str) -> dict[str, Any]:
    result = [{"metric": {"n": str(n)}, "value": [1.5, value]} for n, value in enumerate(values)]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


def metadata(**changes: Any) -> PrometheusMetadata:
    return PrometheusMetadata(server_address="http://p:9090/", query="q", threshold=1, **changes)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (vector("7"), 7.0),
        (vector("0.25"), 0.25),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1.5, "3"]}}, 3.0),
        (vector(), 0.0),  # ignoreNullValues is true by default
        (vector("NaN"), 0.0),
        (vector("+Inf"), 0.0),
    ],
)
async def test_the_value_of_a_query(answer: Any, value: float) -> None:
    async with prometheus(answer) as client:
        assert await value_of(client, metadata()) == value


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (vector(), 200, "the query gives no sample"),
        (vector("NaN"), 200, "the query gives nan"),
        (vector("1", "2"), 200, "gives 2 series"),
        ({"status": "error", "error": "parse error"}, 400, "refused the query: parse error"),
        ("<html>", 502, "answered 502 with something else"),
        ({"status": "success", "data": {"resultType": "vector", "result": [{}]}}, 200, "something else"),
        ("[]", 200, "something else"),
    ],
)
async def test_no_value_says_why(answer: Any, status: int, words: str) -> None:
    async with prometheus(answer, status) as client:
        with pytest.raises(NoValueError, match=words):
            await value_of(client, metadata(ignore_null_values="false"))


async def test_a_prometheus_that_is_not_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse)) as client:
        with pytest.raises(NoValueError, match="does not answer"):
            await value_of(client, metadata())
