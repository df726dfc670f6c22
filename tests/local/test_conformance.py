"""Everything that these tests left in the running stack's store, against the registry of names."""

from __future__ import annotations

import json
import time

import pytest
from commands import llmtrace

from llmtrace.cli_conformance import SETTLE_S
from llmtrace.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


def test_every_trace_is_as_the_registry_declares_it(began: float) -> None:
    sent = llmtrace("verify", Stack.load().scenario, "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    time.sleep(SETTLE_S + 1)
    since = f"{int(time.time() - began) + 1}s"
    done = llmtrace("conformance", "--since", since, "--limit", "10000", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["findings"] == []
    assert report["traces"] >= len(json.loads(sent.stdout)["traces"])


def test_a_store_that_is_not_there_gives_one_sentence() -> None:
    done = llmtrace("conformance", "--store", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("llmtrace: ")
