"""Which model servers a scenario has."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrace.deploy import playbook
from llmtrace.deploy.topology import SCENARIOS, ModelServer, model_servers
from llmtrace.errors import UserError
from llmtrace.scenarios import catalogue

VARIABLES: dict[str, Any] = {
    "scenario": "pd-disaggregation",
    "vllm_servers": 3,
    "prefill_servers": 1,
    "autoscaling_min_servers": 1,
    "vllm_base_port": 18100,
    "vllm_side_channel_base_port": 18300,
    "sidecar_base_port": 18200,
}


def test_servers_with_both_roles_are_counted_up() -> None:
    found = model_servers(VARIABLES | {"scenario": "prefix-cache", "vllm_servers": "2"})
    assert found == [ModelServer("vllm-0", "both", 18100), ModelServer("vllm-1", "both", 18101)]
    assert [server.endpoint_port for server in found] == [18100, 18101]


def test_decode_servers_stand_behind_sidecars() -> None:
    prefill, *decode = model_servers(VARIABLES)
    assert prefill == ModelServer("prefill-0", "prefill", 18100, None, 18300)
    assert decode == [
        ModelServer("decode-0", "decode", 18101, 18200, 18301),
        ModelServer("decode-1", "decode", 18102, 18201, 18302),
    ]
    assert [server.endpoint_port for server in (prefill, *decode)] == [18100, 18200, 18201]


def test_the_ranks_of_wide_expert_parallelism_are_one_server() -> None:
    assert model_servers(VARIABLES | {"scenario": "wide-ep"}) == [ModelServer("moe-0", "both", 18100)]


def test_servers_beyond_the_fewest_wait_for_a_scaler() -> None:
    found = model_servers(VARIABLES | {"scenario": "autoscaling"})
    assert [(server.name, server.standby) for server in found] == [
        ("vllm-0", False),
        ("vllm-1", True),
        ("vllm-2", True),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scenario": "prefix"}, ["no scenario 'prefix'", "prefix-cache, pd-disaggregation, wide-ep or autoscaling"]),
        (
            {"scenario": "autoscaling", "autoscaling_min_servers": 4},
            ["autoscaling_min_servers is 4 of 3 vllm_servers", "lower autoscaling_min_servers"],
        ),
        ({"vllm_servers": "many"}, ["vllm_servers is 'many'", "whole number"]),
        ({"vllm_servers": 0}, ["vllm_servers is 0"]),
        ({"prefill_servers": 3}, ["prefill_servers is 3 of 3", "no decode server"]),
        ({"sidecar_base_port": 70000}, ["sidecar_base_port is 70000"]),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        model_servers(VARIABLES | changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_every_scenario_can_be_stood_up() -> None:
    assert list(SCENARIOS) == list(catalogue.SCENARIOS)


def test_the_default_inventory_describes_every_scenario() -> None:
    variables = playbook.default_variables()
    for scenario in SCENARIOS:
        assert model_servers(variables | {"scenario": scenario})
        assert variables["gateway_ports"][scenario].keys() == variables["picker_ports"][scenario].keys()
