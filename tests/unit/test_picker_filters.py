"""The filters by label, on llm-d's own cases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picking import Handle
from pydantic import ValidationError

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Plugin

LABELS = {
    "nginx-1": {"app": "nginx", "version": "v1.0", "tier": "frontend"},
    "nginx-2": {"app": "nginx", "version": "v1.1", "tier": "frontend"},
    "coredns-1": {"app": "coredns", "tier": "system"},
    "redis-1": {"app": "redis", "tier": "backend", "deprecated": "true"},
    "web-1": {"app": "web", "tier": "frontend", "environment": "production"},
}
ROLES = ("encode", "prefill", "decode", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both")


def make(kind: str, **parameters: Any) -> Any:
    plugin: type[Plugin[Any]] = REGISTRY.types[kind]
    return plugin("f", plugin.parameters_type.model_validate(parameters), Handle())


def endpoints(labels: dict[str, dict[str, str]]) -> list[Endpoint]:
    return [Endpoint(name, "default", f"10.0.0.{i}", "8000", of) for i, (name, of) in enumerate(labels.items(), 1)]


def kept(kind: str, labels: dict[str, dict[str, str]], **parameters: Any) -> list[str]:
    return [endpoint.name for endpoint in make(kind, **parameters).filter(None, endpoints(labels))]


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("decode-filter", ["decode", "prefill-decode", "encode-prefill-decode", "both", "no-label", "other-label"]),
        ("prefill-filter", ["prefill", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both"]),
    ],
)
def test_role_filters(kind: str, roles: list[str]) -> None:
    """Source: llm-d-router, filter/bylabel/roles_test.go, TestRoleFilterDecodeRole and TestRoleFilterPrefillRole."""
    labels: dict[str, dict[str, str]] = {role: {"llm-d.ai/role": role} for role in ROLES}
    labels |= {"no-label": {}, "other-label": {"app": "vllm"}, "unknown": {"llm-d.ai/role": "cook"}}
    assert kept(kind, labels) == roles
    assert kept(kind, {}) == []


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"label": "app", "validValues": ["nginx"]}, ["nginx-1", "nginx-2"]),
        ({"label": "version", "validValues": ["v1.0"]}, ["nginx-1"]),
        ({"label": "tier", "allowsNoLabel": True}, ["no-tier"]),
        ({"label": "tier", "validValues": ["frontend", "backend", "system"]}, list(LABELS)),
    ],
)
def test_by_label(parameters: dict[str, Any], names: list[str]) -> None:
    """Source: llm-d-router, filter/bylabel/filter_test.go, TestByLabelFiltering."""
    assert kept("by-label", {**LABELS, "no-tier": {"app": "unknown"}}, **parameters) == names


@pytest.mark.parametrize("kind", ["label-selector-filter", "by-label-selector"])
@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"matchLabels": {"app": "nginx"}}, ["nginx-1", "nginx-2"]),
        ({"matchLabels": {"app": "nginx", "version": "v1.0"}}, ["nginx-1"]),
        (
            {"matchExpressions": [{"key": "tier", "operator": "In", "values": ["frontend", "backend"]}]},
            ["nginx-1", "nginx-2", "redis-1", "web-1"],
        ),
        (
            {"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["system"]}]},
            ["nginx-1", "nginx-2", "redis-1", "web-1"],
        ),
        ({"matchExpressions": [{"key": "version", "operator": "NotIn", "values": ["v1.0"]}]}, [*LABELS][1:]),
        ({"matchExpressions": [{"key": "deprecated", "operator": "Exists"}]}, ["redis-1"]),
        (
            {"matchExpressions": [{"key": "deprecated", "operator": "DoesNotExist"}]},
            ["nginx-1", "nginx-2", "coredns-1", "web-1"],
        ),
        (
            {
                "matchLabels": {"tier": "frontend"},
                "matchExpressions": [{"key": "environment", "operator": "Exists"}],
            },
            ["web-1"],
        ),
        ({}, list(LABELS)),
        ({"matchLabels": {"app": "nonexistent"}}, []),
    ],
)
def test_label_selector_filter(kind: str, selector: dict[str, Any], names: list[str]) -> None:
    """Source: llm-d-router, filter/bylabel/selector_test.go, TestLabelSelectorFilterFiltering; NotIn: Kubernetes."""
    assert kept(kind, LABELS, **selector) == names


def test_label_selector_filter_keeps_no_unlabelled_endpoint_by_role() -> None:
    """Source: llm-d-router, selector_test.go, TestLabelSelectorFilterHasNoAllowsNoLabelEscapeHatch."""
    role = {"key": "llm-d.ai/role", "operator": "In", "values": ["decode", "prefill-decode"]}
    labels: dict[str, dict[str, str]] = {
        "decode-0": {"llm-d.ai/role": "decode"},
        "encode-0": {"llm-d.ai/role": "encode"},
        "mystery-0": {},
    }
    assert kept("label-selector-filter", labels, matchExpressions=[role]) == ["decode-0"]


@pytest.mark.parametrize(
    ("kind", "parameters", "sentence"),
    [
        ("by-label", {"label": "", "validValues": ["prefill"]}, "at least 1 character"),
        ("by-label", {"validValues": ["prefill"]}, "Field required"),
        ("by-label", {"label": "role", "validValues": []}, "validValues must not be empty where allowsNoLabel is off"),
        ("by-label", {"label": "role"}, "validValues must not be empty"),
        ("by-label", {"label": "role", "validValues": "true"}, "valid list"),
        ("by-label", {"label": "role", "allowsNoLabel": "yes"}, "valid boolean"),
        (
            "label-selector-filter",
            {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["x"]}]},
            "'In', 'NotIn', 'Exists' or 'DoesNotExist'",
        ),
        (
            "label-selector-filter",
            {"matchExpressions": [{"key": "app", "operator": "In"}]},
            "values must be given for the operators In and NotIn, and for no other",
        ),
        (
            "label-selector-filter",
            {"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["x"]}]},
            "values must be given for the operators In and NotIn, and for no other",
        ),
        ("label-selector-filter", {"matchLabels": {"-app": "x"}}, "no name of a Kubernetes label"),
        ("label-selector-filter", {"matchLabels": {"a/b/c": "x"}}, "no name of a Kubernetes label"),
        ("label-selector-filter", {"matchLabels": {"/app": "x"}}, "no name of a Kubernetes label"),
        ("label-selector-filter", {"matchLabels": {"app": "x y"}}, "no value of a Kubernetes label"),
        ("label-selector-filter", {"matchLabels": {"app": "x" * 64}}, "no value of a Kubernetes label"),
        ("decode-filter", {"label": "role"}, "Extra inputs are not permitted"),
    ],
)
def test_parameters_that_llm_d_refuses(kind: str, parameters: dict[str, Any], sentence: str) -> None:
    """Sources: llm-d-router, filter_test.go and selector_test.go (factories); Kubernetes, LabelSelectorAsSelector."""
    with pytest.raises(ValidationError, match=sentence):
        make(kind, **parameters)


@pytest.mark.parametrize("key", ["app", "llm-d.ai/role", "leaderworkerset.sigs.k8s.io/worker-index", "a", "A_b.c-d"])
@pytest.mark.parametrize("value", ["", "0", "prefill-decode", "v1.0_x", "x" * 63])
def test_labels_that_kubernetes_allows(key: str, value: str) -> None:
    assert kept("label-selector-filter", {"e": {key: value}}, matchLabels={key: value}) == ["e"]


labels = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y", ""]), max_size=3)
requirements = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["a", "b"]),
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(st.sampled_from(["x", "y", ""]), min_size=1, max_size=3),
        }
    ),
    st.fixed_dictionaries(
        {"key": st.sampled_from(["a", "b"]), "operator": st.sampled_from(["Exists", "DoesNotExist"])}
    ),
)


@given(st.lists(labels, max_size=6), labels, st.lists(requirements, max_size=3))
def test_a_selector_is_what_its_parts_have_in_common(
    found: list[dict[str, str]], match: dict[str, str], expressions: list[dict[str, Any]]
) -> None:
    named = {f"e{i}": each for i, each in enumerate(found)}
    whole = kept("label-selector-filter", named, matchLabels=match, matchExpressions=expressions)
    parts = [kept("label-selector-filter", named, matchLabels={key: value}) for key, value in match.items()]
    parts += [kept("label-selector-filter", named, matchExpressions=[each]) for each in expressions]
    assert whole == [name for name in named if all(name in part for part in parts)]


@given(st.lists(labels, max_size=6), requirements)
def test_each_operator_keeps_what_its_opposite_drops(found: list[dict[str, str]], requirement: dict[str, Any]) -> None:
    opposite = {"In": "NotIn", "NotIn": "In", "Exists": "DoesNotExist", "DoesNotExist": "Exists"}
    named = {f"e{i}": each for i, each in enumerate(found)}
    ours = kept("label-selector-filter", named, matchExpressions=[requirement])
    others = kept(
        "label-selector-filter",
        named,
        matchExpressions=[{**requirement, "operator": opposite[requirement["operator"]]}],
    )
    assert sorted([*ours, *others]) == sorted(named)
