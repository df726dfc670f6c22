"""The rule of the deciders, what it may say for the servers' own numbers, and where its configuration is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from example_stack import STACK
from hypothesis import given
from hypothesis import strategies as st

from llmtrace.scenarios.pd_disaggregation.rule import (
    ALWAYS_DECIDER,
    ESTIMATE_SHARE,
    PICKER_BLOCK_TOKENS,
    PREFIX_DECIDER,
    Decider,
    Reason,
    configured,
    decider_of,
    possible_reasons,
    read_decider,
    reason,
)
from llmtrace.semconv import attributes as a
from llmtrace.semconv.definitions import registry
from llmtrace.stack import Stack

THRESHOLD = Decider(PREFIX_DECIDER, 512, 128)
DECIDERS = st.one_of(
    st.just(Decider(ALWAYS_DECIDER)),
    st.builds(Decider, st.just(PREFIX_DECIDER), st.integers(0, 3000), st.integers(0, 500)),
)


def test_the_reasons_are_those_that_the_registry_declares() -> None:
    assert [str(reason) for reason in Reason] == list(registry().attributes[a.PD_REASON].members)


@pytest.mark.parametrize(
    ("decider", "prompt", "cached", "expected"),
    [
        (Decider(ALWAYS_DECIDER), 1, 0, Reason.ALWAYS),
        (Decider(PREFIX_DECIDER, 0), 5000, 0, Reason.SPLITTING_DISABLED),
        (THRESHOLD, 127, 0, Reason.PROMPT_BELOW_MINIMUM),
        (THRESHOLD, 128, 0, Reason.BELOW_THRESHOLD),
        (THRESHOLD, 512, 0, Reason.ABOVE_THRESHOLD),
        (THRESHOLD, 1640, 1128, Reason.ABOVE_THRESHOLD),
        (THRESHOLD, 1640, 1129, Reason.BELOW_THRESHOLD),
        (THRESHOLD, 1640, None, Reason.NO_PREFIX_DATA),
        (THRESHOLD, 511, None, Reason.BELOW_THRESHOLD),
    ],
)
def test_the_rule(decider: Decider, prompt: int, cached: int | None, expected: Reason) -> None:
    assert reason(decider, prompt, cached) == expected


@given(DECIDERS, st.integers(0, 4000), st.floats(0, 1), st.sampled_from([16, 32, 128]))
def test_what_the_rule_says_is_possible(decider: Decider, prompt: int, share: float, kv_block: int) -> None:
    cached = int(prompt * share) // kv_block * kv_block
    assert reason(decider, prompt, cached) in possible_reasons(decider, prompt, cached, kv_block)


@given(
    DECIDERS,
    st.integers(1, 4000),
    st.floats(0, 1),
    st.floats(1 - ESTIMATE_SHARE, 1 + ESTIMATE_SHARE),
    st.sampled_from([16, 32, 128]),
)
def test_a_picker_that_estimates_within_the_tolerance_says_what_is_possible(
    decider: Decider, prompt: int, share: float, estimate: float, kv_block: int
) -> None:
    shared = int(prompt * share)
    on_server = shared // kv_block * kv_block
    believed = int(shared * estimate) // PICKER_BLOCK_TOKENS * PICKER_BLOCK_TOKENS
    said = reason(decider, int(prompt * estimate), believed)
    assert said in possible_reasons(decider, prompt, on_server, kv_block)


def test_far_from_the_threshold_there_is_one_possible_reason() -> None:
    assert possible_reasons(THRESHOLD, 1640, 0, 32) == {Reason.ABOVE_THRESHOLD}
    assert possible_reasons(THRESHOLD, 1640, 1536, 32) == {Reason.BELOW_THRESHOLD}
    assert possible_reasons(THRESHOLD, 20, 0, 32) == {Reason.PROMPT_BELOW_MINIMUM}
    assert possible_reasons(THRESHOLD, 520, 0, 32) == {Reason.ABOVE_THRESHOLD, Reason.BELOW_THRESHOLD}


@given(DECIDERS)
def test_a_decider_survives_the_way_through_attributes(decider: Decider) -> None:
    told = decider_of(decider.attributes)
    assert told is not None
    assert (told.type, told.threshold_tokens) == (decider.type, decider.threshold_tokens)


def test_attributes_without_a_decider() -> None:
    assert decider_of({}) is None
    assert decider_of({"llmtrace.pd.decider": PREFIX_DECIDER}) is None


HANDLER = {"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": "mine"}}}
MINE = {"type": PREFIX_DECIDER, "name": "mine", "parameters": {"nonCachedTokens": 300, "promptTokens": 20}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"plugins": [MINE, HANDLER]}, Decider(PREFIX_DECIDER, 300, 20)),
        ({"plugins": [{"type": PREFIX_DECIDER, "name": "mine"}, HANDLER]}, Decider(PREFIX_DECIDER)),
        ({"plugins": [{"type": "mine"}, HANDLER]}, Decider("mine")),
        ({"plugins": [MINE]}, None),
        ({"plugins": [HANDLER]}, None),
        ({"plugins": [{"type": "disagg-profile-handler"}, MINE]}, None),
        ({"plugins": "none"}, None),
        ([1, 2], None),
        (None, None),
    ],
)
def test_the_decider_of_a_configuration(config: Any, expected: Decider | None) -> None:
    assert read_decider(config) == expected


def test_the_deciders_of_a_stack_are_those_of_its_pickers_files(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"plugins": [MINE, HANDLER]}))
    (tmp_path / "bad.yaml").write_text("plugins: [")
    picker = STACK["pickers"]["random"]  # type: ignore[index]
    files = {"by-threshold": "good.yaml", "always-split": "bad.yaml", "never-split": "none.yaml"}
    pickers = {arm: {**picker, "config": str(tmp_path / file)} for arm, file in files.items()}
    found = configured(Stack.model_validate({**STACK, "pickers": pickers}))
    assert found == {
        "by-threshold": {
            "llmtrace.pd.decider": PREFIX_DECIDER,
            "llmtrace.pd.threshold_tokens": 300,
            "llmtrace.pd.minimum_prompt_tokens": 20,
        }
    }
