"""What the watcher reads from HPAs, ScaledObjects, VariantAutoscalings, pods and events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_objects import (
    METRIC,
    condition,
    deployment,
    event,
    hpa,
    leader_worker_set,
    member,
    ns,
    owned_by_keda,
    pod,
    pulled,
    rescale,
    scaled_object,
    variant_autoscaling,
)

from llmtrace.autoscale.kubernetes import pods, scalers
from llmtrace.autoscale.kubernetes.cluster import DEPLOYMENTS, LEADER_WORKER_SETS, Cluster
from llmtrace.autoscale.kubernetes.objects import get, nanoseconds, quantity, selects
from llmtrace.autoscale.kubernetes.scalers import Target
from llmtrace.traces.demand import Part, demand


def test_a_version_that_tells_of_a_change_has_its_numbers_and_the_metrics_that_drove_it():
    found = scalers.read(hpa(3, 7, 12, limited=("True", "TooManyReplicas"), maximum=7), [], [])
    assert (found.scaler_kind, found.scaler_name) == ("HorizontalPodAutoscaler", "llm-d/vllm")
    assert (found.current, found.desired, found.scaled_ns, found.fresh) == (3, 7, ns(12), True)
    assert found.target == Target("Deployment", "llm-d", "vllm")
    (metric,) = found.metrics
    # 2.333 on average over three replicas.
    assert metric.value == pytest.approx(6.999)
    assert (metric.target, metric.target_type, metric.proposal) == (1.0, "AverageValue", 7)
    assert metric.query == f'{METRIC}{{model_name="llama"}}'
    assert (found.metric, found.recommended) == (METRIC, 7)
    assert (found.limit, found.held) == ("TooManyReplicas", "TooManyReplicas")
    assert found.reason == f"{METRIC} above target"


def test_a_scaled_object_is_named_as_the_scaler_and_has_the_query():
    found = scalers.read(hpa(1, 3, 12, **owned_by_keda()), [scaled_object()], [])
    assert (found.scaler_kind, found.scaler_name) == ("ScaledObject", "llm-d/vllm-scaling")
    assert found.metrics[0].name == "epp-queue-size"
    assert found.metrics[0].query == 'sum(llm_d_epp_flow_control_queue_size{model_name="llama"})'


def test_a_formula_over_triggers_is_one_metric_of_which_nobody_can_tell_the_requests():
    """KEDA's scalingModifiers, as llm-d's SLO-aware signal has them."""
    about = owned_by_keda() | {"metric": "composite-metric"}
    (metric,) = scalers.read(hpa(1, 3, 12, **about), [scaled_object()], []).metrics
    assert metric.name == "composite-metric"
    assert demand(metric.query).part is None
    plain = scalers.read(hpa(1, 3, 12, **owned_by_keda()), [scaled_object()], []).metrics
    assert demand(plain[0].query).part is Part.WAITING


def test_a_fallback_that_keda_serves_holds_the_number():
    owner = scaled_object() | {
        "status": {"conditions": [condition("Fallback", "True", "FallbackExists", "a trigger fails")]}
    }
    assert scalers.read(hpa(3, 3, **owned_by_keda()), [owner], []).held == "Fallback: a trigger fails"
    assert scalers.read(hpa(3, 3, **owned_by_keda()), [scaled_object()], []).held == ""


def test_a_variant_autoscaling_is_the_scaler_where_the_hpa_scales_on_its_metric():
    found = scalers.read(hpa(1, 3, 12, metric="wva_desired_replicas"), [], [variant_autoscaling()])
    assert (found.scaler_kind, found.scaler_name) == ("VariantAutoscaling", "llm-d/vllm-variant")
    assert found.reason == "Optimizer solution: cost-optimal allocation"
    plain = scalers.read(hpa(1, 3, 12), [], [variant_autoscaling()])
    assert plain.scaler_kind == "HorizontalPodAutoscaler"


def test_a_metric_without_value_says_why():
    failure = "the HPA was unable to compute the replica count: unable to get external metric"
    found = scalers.read(hpa(2, 2, average=None, active=("False", "FailedGetExternalMetric", failure)), [], [])
    assert found.metrics[0].value is None
    assert found.metrics[0].failure == failure
    assert found.held == f"FailedGetExternalMetric: {failure}"
    assert found.recommended is None


@pytest.mark.parametrize(
    ("kind", "target", "current", "value"),
    [
        ("Resource", {"type": "Utilization", "averageUtilization": 80}, {"averageUtilization": 160}, 160.0),
        ("Object", {"type": "Value", "value": "2k"}, {"value": "1500"}, 1500.0),
        ("Pods", {"type": "AverageValue", "averageValue": "10"}, {"averageValue": "12500m"}, 25.0),
    ],
)
def test_metrics_of_other_types(kind, target, current, value):
    found = hpa(2, 4, 12)
    field = kind[:1].lower() + kind[1:]
    about = {"name": "cpu"} if kind == "Resource" else {"metric": {"name": "cpu"}}
    found["spec"]["metrics"] = [{"type": kind, field: about | {"target": target}}]
    found["status"]["currentMetrics"] = [{"type": kind, field: about | {"current": current}}]
    (metric,) = scalers.read(found, [], []).metrics
    assert (metric.name, metric.value, metric.target_type) == ("cpu", value, target["type"])


def test_what_holds_a_number_back():
    assert scalers.read(hpa(3, 3, able="ScaleDownStabilized"), [], []).held == "ScaleDownStabilized"
    # At the minimum nothing would be taken away anyway.
    assert scalers.read(hpa(1, 1, able="ScaleDownStabilized"), [], []).held == ""
    assert scalers.read(hpa(1, 1, limited=("True", "TooFewReplicas")), [], []).held == ""
    assert scalers.read(hpa(3, 3, limited=("True", "ScaleUpLimit")), [], []).held == "ScaleUpLimit"


def test_an_event_tells_of_a_change_with_its_reason_and_metric():
    (found,) = scalers.rescales(rescale(3, 12))
    assert (found.time_ns, found.desired, found.metric) == (ns(12), 3, METRIC)
    assert found.reason.startswith("external metric")
    # Counted: the first and the last of the same words.
    assert [r.time_ns for r in scalers.rescales(rescale(3, 90, first=12))] == [ns(12), ns(90)]


def test_other_events_tell_of_no_change():
    assert (
        scalers.rescales(event("SuccessfulRescale", "New size", 1, {"kind": "HorizontalPodAutoscaler", "name": "v"}))
        == []
    )
    assert scalers.rescales(event("SuccessfulRescale", "New size: 3; reason: x", 1, {"kind": "Foo", "name": "v"})) == []


def test_a_pod_tells_how_far_its_start_is():
    found = pods.read(pod("vllm-a", 1, 2, 5, 40))
    assert (found.created_ns, found.scheduled_ns, found.started_ns, found.ready_ns) == (ns(1), ns(2), ns(5), ns(40))
    assert found.trouble == ""
    pending = pods.read(pod("vllm-a", 1, unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."))
    assert pending.scheduled_ns is None
    assert pending.trouble == "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    assert pods.read(pod("vllm-a", 1, 2, waiting="ImagePullBackOff")).trouble == "vllm: ImagePullBackOff"


def test_a_container_that_ends_again_and_again_says_how():
    found = pod("vllm-a", 1, 2, waiting="CrashLoopBackOff")
    found["status"]["containerStatuses"][0]["lastState"] = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    assert pods.read(found).trouble == "vllm: CrashLoopBackOff; it ended with OOMKilled (137)"


def test_a_pod_that_ends_tells_when_it_was_told_to():
    found = pods.read(pod("vllm-a", 1, 2, 5, 40, deleted=100, ended=112))
    assert (found.deleting_ns, found.ended_ns, found.killed) == (ns(100), ns(112), False)
    assert pods.read(pod("vllm-a", 1, 2, 5, 40, deleted=100, ended=130, exit_code=137)).killed


def test_a_replica_of_a_leader_worker_set_is_a_group():
    own = [
        pods.read(member(1, 0, 1, 2, 5, 40)),
        pods.read(member(1, 1, 1, 3, 9, 60)),
        pods.read(member(0, 0, -50, 2, 5, 6)),
    ]
    first, second = pods.replicas("LeaderWorkerSet", own, 2)
    assert (first.name, second.name) == ("vllm-0", "vllm-1")
    assert second.last(p.ready_ns for p in second.pods) == ns(60)
    # A group whose worker is missing is not ready.
    assert first.last(p.ready_ns for p in first.pods) is None


def test_images_of_init_containers_do_not_count():
    assert pods.pulled(pulled("vllm-a", 7)) == ("vllm-a", ns(7))
    other = pulled("vllm-a", 7)
    other["involvedObject"]["fieldPath"] = "spec.initContainers{prepare}"
    assert pods.pulled(other) is None


def test_a_replica_costs_what_its_containers_are_limited_to():
    cluster = Cluster()
    cluster.replace(DEPLOYMENTS, [deployment(1)])
    cluster.replace(LEADER_WORKER_SETS, [leader_worker_set(2, 4)])
    assert cluster.accelerators(Target("Deployment", "llm-d", "vllm"), 1.0) == 2.0
    assert cluster.accelerators(Target("LeaderWorkerSet", "llm-d", "vllm"), 1.0) == 32.0
    assert cluster.accelerators(Target("Deployment", "llm-d", "other"), 1.5) == 1.5


def test_selectors():
    labels = {"app": "vllm", "role": "decode"}
    assert selects({"matchLabels": {"app": "vllm"}}, labels)
    assert not selects({"matchLabels": {"app": "vllm", "role": "prefill"}}, labels)
    for operator, values, holds in (
        ("In", ["decode"], True),
        ("NotIn", ["decode"], False),
        ("Exists", None, True),
        ("DoesNotExist", None, False),
        ("Unknown", None, False),
    ):
        expression = {"key": "role", "operator": operator, "values": values}
        assert selects({"matchExpressions": [expression]}, labels) is holds
    assert not selects({}, labels)


def test_times_and_quantities():
    assert nanoseconds("2027-01-15T08:00:00Z") == 1_800_000_000 * 10**9
    assert nanoseconds("2027-01-15T08:00:00.123456Z") == 1_800_000_000_123_456_000
    assert nanoseconds(None) is None
    assert nanoseconds("soon") is None
    assert [quantity(t) for t in ("500m", "2", "1k", "1Ki", "x", None)] == [0.5, 2.0, 1000.0, 1024.0, None, None]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["metadata", "name", "x"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(json_values, st.lists(st.sampled_from(["metadata", "name", "x"]), max_size=3))
def test_a_path_is_read_from_whatever_there_is(value, path):
    get(value, *path)


def test_conditions_that_are_absent_are_empty():
    assert scalers.condition({"status": {}}, "Ready") == {}
    assert scalers.condition({"status": {"conditions": [condition("Ready", "True", "")]}}, "Ready")["status"] == "True"
