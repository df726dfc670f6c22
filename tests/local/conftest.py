"""Settings of the tests on the local stack."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from commands import llmtrace
from loopback import Receiver, receiving

from llmtrace.scenarios.autoscaling import SCENARIO as AUTOSCALING
from llmtrace.scenarios.pd_disaggregation import SCENARIO as PD
from llmtrace.scenarios.wide_ep import SCENARIO as WIDE_EP
from llmtrace.semconv.conformance import check
from llmtrace.stack import Stack

pytest.register_assert_rewrite("engine_servers", "engine_trees", "engine_workload")


LAST = (
    "test_walkthrough.py",
    "test_autoscaling.py",
    "test_dashboards_autoscaling.py",
    "test_autoscaling_faults.py",
    "test_wide_ep.py",
    "test_dashboards_wide_ep.py",
    "test_pd_disaggregation.py",
    "test_dashboards_pd.py",
    "test_pd_faults.py",
    "test_conformance.py",
)
"""The walkthrough leaves the last scenario's topology, which its tests go on with; conformance looks at everything that
these tests left in the store.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests so that the topology of the stack changes as rarely as can be."""

    def rank(item: pytest.Item) -> int:
        name = item.path.name
        return 1 + LAST.index(name) if item.path.parent.name == "local" and name in LAST else 0

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def began() -> float:
    """When the first of these tests began, in seconds since the epoch: what the store had before is not theirs."""
    return time.time()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """What the module's own servers send their spans to; at the end, all of them must be as the registry says."""
    with receiving() as receiver:
        yield receiver
        assert check(map(receiver.trace, receiver.trace_ids())).findings == []


@pytest.fixture(scope="module")
def pd_stack() -> Stack:
    """The running stack with prefill and decode servers; stood up for them if it is not."""
    return _stack_of(PD.name)


@pytest.fixture(scope="module")
def wide_ep_stack() -> Stack:
    """The running stack with a mixture of experts on two ranks; stood up for it if it is not."""
    return _stack_of(WIDE_EP.name)


@pytest.fixture(scope="module")
def autoscaling_stack() -> Stack:
    """The running stack with a scaler; stood up for it if it is not."""
    return _stack_of(AUTOSCALING.name)


def _stack_of(scenario: str) -> Stack:
    if Stack.load().scenario != scenario:
        done = llmtrace("up", "-e", f"scenario={scenario}")
        assert done.returncode == 0, done.stdout + done.stderr
    return Stack.load()
