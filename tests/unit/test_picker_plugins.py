from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picking import Handle, endpoint

from llmtrace.picker.plugin import REGISTRY, Plugin
from llmtrace.picker.prefix_match import PrefixMatch
from llmtrace.picker.request import InferenceRequest, RequestError
from llmtrace.semconv import attributes as a

loads = st.lists(
    st.fixed_dictionaries({"waiting": st.integers(0, 500), "kv_cache_usage": st.floats(0, 1)}), min_size=1, max_size=9
)


def make(kind: str, **parameters: Any) -> Any:
    plugin: type[Plugin[Any]] = REGISTRY.types[kind]
    return plugin("p", plugin.parameters_type.model_validate(parameters), Handle())


def request_with(blocks: dict[str, int], total: int, size: int = 64) -> InferenceRequest:
    match = PrefixMatch(blocks, total, size, total * size)
    return InferenceRequest(id="r", data={"approx-prefix-cache-producer": match})


def score(kind: str, queues: list[int]) -> list[float]:
    found: list[float] = make(kind).score(
        InferenceRequest(id="r"), [endpoint(i, waiting=q) for i, q in enumerate(queues)]
    )
    return found


@pytest.mark.parametrize(
    ("queues", "scores"), [([0, 0], [1, 1]), ([0, 10, 5], [1, 0, 0.5]), ([7], [1]), ([3, 3, 9], [1, 1, 0])]
)
def test_queue_scorer(queues: list[int], scores: list[float]) -> None:
    assert score("queue-scorer", queues) == scores


def test_load_aware_scorer() -> None:
    assert score("load-aware-scorer", [0, 64, 128, 1000]) == [0.5, 0.25, 0, 0]
    assert make("load-aware-scorer", threshold=-1).score(None, [endpoint(0, waiting=64)]) == [0.25]
    assert make("load-aware-scorer", threshold=10).score(None, [endpoint(0, waiting=5)]) == [0.25]


def test_kv_cache_utilization_scorer() -> None:
    endpoints = [endpoint(0, kv_cache_usage=0.25), endpoint(1)]
    assert make("kv-cache-utilization-scorer").score(None, endpoints) == [0.75, 1.0]


def test_prefix_cache_scorer() -> None:
    endpoints = [endpoint(0), endpoint(1)]
    request = request_with({endpoints[0].id: 3}, 4)
    scorer = make("prefix-cache-scorer")
    assert scorer.score(request, endpoints) == [0.75, 0]
    assert scorer.span_attributes(request, endpoints) == {
        a.MATCH_TOKENS: (192, 0),
        a.ESTIMATED_PROMPT_TOKENS: 256,
    }
    assert scorer.score(InferenceRequest(id="r"), endpoints) == [0, 0]
    assert scorer.score(request_with({}, 0), endpoints) == [0, 0]


def test_prefix_cache_scorer_by_length() -> None:
    scorer = make("prefix-cache-scorer", matchLengthWeight=0.5, matchLengthScaleTokens=256)
    one = endpoint(0)
    assert scorer.score(request_with({one.id: 2}, 4), [one]) == [0.5 * 0.5 + 0.5 * 0.25]
    assert scorer.score(request_with({one.id: 8}, 8), [one]) == [1.0], "the length counts no further than the scale"


@given(loads)
def test_every_score_is_a_share(found: list[dict[str, Any]]) -> None:
    endpoints = [endpoint(index, **load) for index, load in enumerate(found)]
    for kind in ("queue-scorer", "load-aware-scorer", "kv-cache-utilization-scorer"):
        scores = make(kind).score(InferenceRequest(id="r"), endpoints)
        assert len(scores) == len(endpoints)
        assert all(0 <= score <= 1 for score in scores)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=9), st.integers(-1, 12))
def test_every_picker_picks_distinct_endpoints(totals: list[float], limit: int) -> None:
    endpoints = [endpoint(index) for index in range(len(totals))]
    for kind in ("random-picker", "max-score-picker", "weighted-random-picker"):
        picked = make(kind, maxNumOfEndpoints=limit).pick(endpoints, totals)
        assert len(picked) == min(max(limit, 1), len(endpoints))
        assert len({each.id for each in picked}) == len(picked)
        assert all(each in endpoints for each in picked)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=9))
def test_max_score_picker_ranks_by_score(totals: list[float]) -> None:
    endpoints = [endpoint(index) for index in range(len(totals))]
    picked = make("max-score-picker", maxNumOfEndpoints=9).pick(endpoints, totals)
    assert [totals[endpoints.index(each)] for each in picked] == sorted(totals, reverse=True)


def chances(kind: str, totals: list[float], draws: int = 4000) -> list[float]:
    endpoints, plugin = [endpoint(index) for index in range(len(totals))], make(kind)
    counts = Counter(plugin.pick(endpoints, totals)[0].id for _ in range(draws))
    return [counts[each.id] / draws for each in endpoints]


@pytest.mark.parametrize(
    ("kind", "totals", "expected"),
    [
        ("random-picker", [0.0, 1.0, 5.0, 2.0], [0.25] * 4),
        ("max-score-picker", [2.0, 2.0, 1.0], [0.5, 0.5, 0]),
        ("weighted-random-picker", [1.0, 3.0, 0.0], [0.25, 0.75, 0]),
        ("weighted-random-picker", [0.0, 0.0], [0.5, 0.5]),
    ],
)
def test_chances(kind: str, totals: list[float], expected: list[float]) -> None:
    assert chances(kind, totals) == pytest.approx(expected, abs=0.05)


def test_single_profile_handler() -> None:
    handler = make("single-profile-handler")
    assert list(handler.pick(None, ["default"], {}, None)) == ["default"]
    assert list(handler.pick(None, ["default"], {"default": None}, None)) == []
    with pytest.raises(RequestError, match="failed to run scheduler profile 'default'") as caught:
        handler.process(None, {"default": None})
    assert caught.value.status == 429
