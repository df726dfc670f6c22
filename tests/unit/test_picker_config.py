from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from picking import DISAGGREGATED, PREFIX_AWARE, Handle

from llmtrace.errors import UserError
from llmtrace.picker import config
from llmtrace.picker.plugins.approx_prefix_cache_producer import ApproxPrefixCacheProducer
from llmtrace.picker.plugins.disagg_profile_handler import DisaggProfileHandler
from llmtrace.picker.plugins.max_score_picker import MaxScorePicker
from llmtrace.picker.plugins.single_profile_handler import SingleProfileHandler


def load(tmp_path: Path, content: Any) -> config.Configuration:
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return config.load(path, Handle())


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(PREFIX_AWARE), **changes}


def plugins(*specs: dict[str, Any]) -> dict[str, Any]:
    return changed(plugins=[PREFIX_AWARE["plugins"][0], *specs], schedulingProfiles=[])


def disaggregated(**parameters: Any) -> dict[str, Any]:
    """llm-d's example of disaggregation with other parameters of its profile handler."""
    changed = copy.deepcopy(DISAGGREGATED)
    changed["plugins"][5]["parameters"] = parameters
    return changed


TWO = [{"name": "a"}, {"name": "b"}]


def test_disaggregation_becomes_profiles_with_filters(tmp_path: Path) -> None:
    found = load(tmp_path, DISAGGREGATED)
    assert [filter_.type for filter_ in found.profiles["prefill"].filters] == ["prefill-filter"]
    assert [filter_.type for filter_ in found.profiles["decode"].filters] == ["decode-filter"]
    assert isinstance(found.handler, DisaggProfileHandler)
    assert [producer.type for producer in found.producers] == ["approx-prefix-cache-producer"]


def test_plugins_may_stand_in_any_order(tmp_path: Path) -> None:
    """llm-d sorts plugins by their references; its own pd-epp-config.yaml has the handler before the decider."""
    content = copy.deepcopy(DISAGGREGATED)
    content["plugins"].reverse()
    assert isinstance(load(tmp_path, content).handler, DisaggProfileHandler)


def test_the_decider_gets_its_producer(tmp_path: Path) -> None:
    found = load(tmp_path, plugins({"type": "prefix-based-pd-decider"}))
    assert [producer.name for producer in found.producers] == ["approx-prefix-cache-producer"]


def test_without_profiles_filters_are_in_the_default_one(tmp_path: Path) -> None:
    found = load(tmp_path, plugins({"type": "decode-filter"}, {"type": "queue-scorer"}))
    assert [filter_.type for filter_ in found.profiles["default"].filters] == ["decode-filter"]


@pytest.mark.parametrize("kind", ["by-label", "by-label-selector"])
def test_what_llm_d_deprecates_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    parameters = {"label": "x", "allowsNoLabel": True} if kind == "by-label" else {}
    load(tmp_path, plugins({"type": kind, "parameters": parameters}))
    assert f"llm-d deprecates the plugin type {kind}; use label-selector-filter" in caplog.text


def test_a_configuration_becomes_plugins_and_profiles(tmp_path: Path) -> None:
    found = load(tmp_path, PREFIX_AWARE)
    profile = found.profiles["default"]
    assert [(w.scorer.type, w.weight) for w in profile.scorers] == [
        ("prefix-cache-scorer", 2),
        ("queue-scorer", 1),
        ("kv-cache-utilization-scorer", 1),
    ]
    assert isinstance(profile.picker, MaxScorePicker)
    assert isinstance(found.handler, SingleProfileHandler)
    assert [producer.type for producer in found.producers] == ["approx-prefix-cache-producer"]


def test_what_is_left_out_gets_llm_ds_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, plugins({"type": "prefix-cache-scorer"}, {"type": "queue-scorer", "name": "q"}))
    profile = found.profiles["default"]
    assert [(w.scorer.name, w.weight) for w in profile.scorers] == [("prefix-cache-scorer", 1.0), ("q", 1.0)]
    assert isinstance(profile.picker, MaxScorePicker)
    (producer,) = found.producers
    assert isinstance(producer, ApproxPrefixCacheProducer)
    assert producer.parameters.auto_tune
    assert producer.parameters.max_prefix_tokens_to_match == 131072


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[", "is no YAML"),
        ("", "must be a mapping"),
        ({}, "apiVersion: is missing"),
        (changed(apiVersion="v2"), "apiVersion: Input should be 'llm-d.ai/v1alpha1', not 'v2'"),
        (changed(kind="Pod"), "kind: Input should be 'EndpointPickerConfig', not 'Pod'"),
        (changed(pluginz=[]), "unknown field 'pluginz'; the nearest known one is 'plugins'"),
        (changed(flowControl={}), "flowControl has no effect without its gate: add featureGates: [flowControl]"),
        (changed(featureGates=["dataLayer"]), "featureGates[0]: the embedded picker has one, flowControl"),
        (changed(flowControl={"maxBytes": "1Gi"}), "flowControl.maxBytes is not part of the embedded picker"),
        (changed(flowControl={"maxRequest": 1}), "unknown field 'maxRequest' at flowControl; the nearest known one is"),
        (changed(flowControl={"defaultRequestTTL": "soon"}), "flowControl.defaultRequestTTL: 'soon' is no duration"),
        (
            changed(featureGates=["flowControl"], flowControl={"saturationDetector": {"pluginRef": "queue-scorer"}}),
            "plugin 'queue-scorer' is of type queue-scorer, which is not a saturation detector",
        ),
        (changed(dataLayer={}), "dataLayer.discovery names no plugin"),
        (changed(dataLayer={"sources": []}), "dataLayer.sources is not part of the embedded picker"),
        (
            changed(dataLayer={"discovery": {"pluginRef": "endpoint"}}),
            "dataLayer.discovery: there is no plugin named 'endpoint'; the nearest known one is 'endpoints'",
        ),
        (
            changed(dataLayer={"discovery": {"pluginRef": "queue-scorer"}}),
            "plugin 'queue-scorer' is of type queue-scorer, which is not a discovery",
        ),
        (
            plugins({"type": "queue-scorrer"}),
            "plugins[1]: unknown plugin type 'queue-scorrer'; the nearest known one is 'queue-scorer'",
        ),
        (plugins({"type": ""}), "plugins[1].type: String should have at least 1 character"),
        (plugins({"name": "x"}), "plugins[1].type: is missing"),
        (
            plugins({"type": "queue-scorer", "parameter": {}}),
            "unknown field 'parameter' at plugins[1]; the nearest known one is 'parameters'",
        ),
        (plugins({"type": "queue-scorer"}, {"type": "queue-scorer"}), "there are two plugins named 'queue-scorer'"),
        (
            plugins({"type": "load-aware-scorer", "parameters": {"treshold": 1}}),
            "(plugins[1]): unknown parameter 'treshold'; the nearest known one is 'threshold'",
        ),
        (
            plugins({"type": "queue-scorer", "parameters": {"x": 1}}),
            "unknown parameter 'x'; none is known here",
        ),
        (
            plugins({"type": "load-aware-scorer", "parameters": {"threshold": "many"}}),
            "plugin 'load-aware-scorer' (plugins[1]): threshold: Input should be a valid integer, not 'many'",
        ),
        (
            plugins({"type": "approx-prefix-cache-producer", "parameters": {"autoTune": False, "blockSizeTokens": 0}}),
            "blockSizeTokens must be more than 0 where autoTune is off",
        ),
        (
            plugins({"type": "prefix-cache-scorer", "parameters": {"matchLengthWeight": 2}}),
            "matchLengthWeight: Input should be less than or equal to 1, not 2",
        ),
        (
            plugins({"type": "prefix-cache-scorer", "parameters": {"prefixMatchInfoProducerName": "nobody"}}),
            "prefixMatchInfoProducerName: there is no plugin named 'nobody'",
        ),
        (plugins({"type": "file-discovery"}), "path: is missing"),
        (
            changed(schedulingProfiles=[{"name": "a", "plugins": [{"pluginRef": "queue"}]}]),
            "schedulingProfiles[a]: there is no plugin named 'queue'; the nearest known one is 'queue-scorer'",
        ),
        (
            changed(schedulingProfiles=[{"name": "a", "plugins": [{"pluginRef": "endpoints"}]}]),
            "which is neither a filter, a scorer nor a picker",
        ),
        (changed(schedulingProfiles=[{"name": "a"}, {"name": "a"}]), "two profiles of the same name"),
        (
            changed(schedulingProfiles=[{"name": "a"}, {"name": "b"}]),
            "several scheduling profiles need a profile handler",
        ),
        (
            changed(schedulingProfiles=[{"name": "a", "plugins": [{"pluginRef": "x", "wheight": 2}]}]),
            "unknown field 'wheight' at schedulingProfiles[0].plugins[0]; the nearest known one is 'weight'",
        ),
        (
            changed(plugins=[*PREFIX_AWARE["plugins"], {"type": "single-profile-handler"}], schedulingProfiles=TWO),
            "single-profile-handler takes one scheduling profile; there are 2",
        ),
        (
            disaggregated(deciders={"prefill": "prefix-based-decider"}),
            "plugin 'disagg-profile-handler': deciders.prefill: there is no plugin named 'prefix-based-decider'; the",
        ),
        (
            disaggregated(deciders={"prefill": "queue-scorer"}),
            "deciders.prefill: plugin 'queue-scorer' is of type queue-scorer, which is not a decider",
        ),
        (
            disaggregated(profiles={"decode": "decoding"}),
            "profiles.decode: there is no scheduling profile named 'decoding'; the nearest known one is 'decode'",
        ),
        (
            disaggregated(profiles={"prefill": "prefil"}, deciders={"prefill": "prefix-based-pd-decider"}),
            "profiles.prefill: there is no scheduling profile named 'prefil'; the nearest known one is 'prefill'",
        ),
        (
            disaggregated(profiles={"prefil": "prefill"}),
            "unknown parameter 'prefil' at profiles; the nearest known one is 'prefill'",
        ),
        (
            disaggregated(deciders={"encode": "always-disagg-multimodal-decider"}),
            "plugin 'disagg-profile-handler' (plugins[5]): deciders: the embedded picker has no stage encode",
        ),
        (
            disaggregated(stageOrder="first"),
            "stageOrder: Input should be 'decode-first' or 'prefill-first', not 'first'",
        ),
        (
            disaggregated(deciderPluginName="prefix-based-pd-decider", profiles={}),
            "profiles and deciders cannot stand beside their deprecated form, here deciderPluginName",
        ),
        (
            plugins({"type": "prefix-based-pd-decider", "parameters": {"nonCachedTokens": -1}}),
            "nonCachedTokens: Input should be greater than or equal to 0, not -1",
        ),
        (
            plugins({"type": "prefix-based-pd-decider", "parameters": {"promptTokens": -1}}),
            "promptTokens: Input should be greater than or equal to 0, not -1",
        ),
        (
            plugins({"type": "prefix-based-pd-decider", "parameters": {"prefixMatchInfoProducerName": "nobody"}}),
            "plugin 'prefix-based-pd-decider': prefixMatchInfoProducerName: there is no plugin named 'nobody'",
        ),
        (
            plugins({"type": "prefix-based-pd-decider", "parameters": {"prefixMatchInfoProducerName": "endpoints"}}),
            "plugin 'endpoints' is of type file-discovery, which is not a producer",
        ),
        (plugins({"type": "always-disagg-pd-decider", "parameters": {"x": 1}}), "unknown parameter 'x'"),
        (plugins({"type": "by-label", "parameters": {"label": "role"}}), "it: validValues must not be empty"),
        (
            plugins(
                {
                    "type": "label-selector-filter",
                    "parameters": {"matchExpressions": [{"key": "role", "operator": "in", "values": ["decode"]}]},
                }
            ),
            "matchExpressions[0].operator: Input should be 'In', 'NotIn', 'Exists' or 'DoesNotExist', not 'in'",
        ),
        (
            plugins({"type": "label-selector-filter", "parameters": {"matchLabels": {"role": 1}}}),
            "matchLabels.role: Input should be a valid string, not 1",
        ),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    assert sentence in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        config.load(tmp_path / "none.yaml", Handle())


@pytest.mark.parametrize("producer", ["approx", "precise"])
@pytest.mark.parametrize(
    ("arm", "profile"),
    [
        *(("prefix-aware", "default"), ("random", "default")),
        *(("by-threshold", "decode"), ("always-split", "decode"), ("never-split", "decode")),
    ],
)
def test_the_stacks_own_configurations_are_accepted(tmp_path: Path, arm: str, profile: str, producer: str) -> None:
    import jinja2
    from ansible.plugins.filter.core import combine

    folder = Path(__file__).parents[2] / "playbooks/roles/picker/templates"
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=False)
    templates.filters |= {"to_json": json.dumps, "combine": combine}
    rendered = templates.get_template(f"{arm}.yaml.j2").render(
        llmtrace_etc_dir="/etc/x",
        vllm_block_size=32,
        vllm_model_name="m",
        pd_threshold_tokens=512,
        prefix_cache_producer=producer,
    )
    loaded = load(tmp_path, rendered)
    assert loaded.profiles[profile].scorers
    assert [made.type for made in loaded.producers] == [f"{producer}-prefix-cache-producer"]
