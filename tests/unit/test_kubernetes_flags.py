"""The watcher's command line."""

from __future__ import annotations

import pytest

from llmtrace.autoscale.kubernetes import __main__ as command
from llmtrace.errors import UserError


def test_it_watches_its_own_namespace_unless_told_otherwise(tmp_path, monkeypatch):
    own = tmp_path / "namespace"
    own.write_text("tracing\n")
    monkeypatch.setattr(command, "SERVICE_ACCOUNT_NAMESPACE", own)
    found, kubeconfig = command.options([])
    assert (found.namespace, found.home, kubeconfig) == ("tracing", "tracing", None)
    assert command.options(["--namespace", "llm-d"])[0].namespace == "llm-d"
    assert command.options(["--all-namespaces"])[0].namespace == ""
    assert command.options(["--own-namespace", "x"])[0].home == "x"


def test_durations_and_prices():
    found, _ = command.options(
        ["--own-namespace", "x", "--ready-timeout", "10m", "--price", "2.5", "--sample-age", "15s"]
    )
    assert found.patience.ready_s == 600
    assert (found.prices.price_per_hour, found.prices.window_ms) == (2.5, 15_000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --own-namespace"),
        (["--own-namespace", "x", "--namespace", "a", "--all-namespaces"], "not allowed with"),
        (["--own-namespace", "x", "--ready-timeout", "soon"], "no duration"),
        (["--own-namespace", "x", "--price", "-1"], "no number"),
        (["--own-namespace", "x", "--names", "a"], "unknown flag --names"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SERVICE_ACCOUNT_NAMESPACE", tmp_path / "missing")
    with pytest.raises(UserError, match=said):
        command.options(arguments)
    assert command.main(arguments) == 2
