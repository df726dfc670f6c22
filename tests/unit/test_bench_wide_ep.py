"""What bench.wide_ep reads and when it fails. How fast anything is, no test says."""

from __future__ import annotations

import sys

import pytest

from bench import wide_ep


@pytest.mark.parametrize("graphs", [False, True])
def test_a_small_measurement(graphs: bool) -> None:
    found = wide_ep.measure(steps=30, ranks=16, experts=8, requests=5, graphs=graphs)
    assert (found["spans"], found["requests"]) == (480, 5)
    assert found["memory, MiB"] > 0
    assert found["store's bytes to a span, us"] > 0


def test_more_than_it_may_need_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wide_ep", "--ranks", "4", "--steps", "20", "--experts", "8", "--requests", "2"])
    monkeypatch.setattr(wide_ep, "MOST_MIB", 10_000)
    assert wide_ep.main() == 0
    monkeypatch.setattr(wide_ep, "MOST_MIB", 1)
    assert wide_ep.main() == 1
    assert "too much: memory, MiB" in capsys.readouterr().err
    assert wide_ep.too_much({"together, s": 10.1, "memory, MiB": 0.5}) == ["together, s: 10.1, at most 10.0"]
