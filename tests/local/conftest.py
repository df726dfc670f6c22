"""Settings of the tests on the local stack."""

from __future__ import annotations

import pytest
from commands import llmtrace

from llmtrace.scenarios.pd_disaggregation import SCENARIO as PD
from llmtrace.stack import Stack

pytest.register_assert_rewrite("engine_servers", "engine_trees", "engine_workload")


LAST = (
    "test_walkthrough.py",
    "test_autoscaling.py",
    "test_dashboards_autoscaling.py",
    "test_pd_disaggregation.py",
    "test_dashboards_pd.py",
    "test_pd_faults.py",
    "test_conformance.py",
)
"""The walkthrough leaves the last scenario's topology, which its tests go on with; conformance looks at everything that
the others left in the store.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests so that the topology of the stack changes as rarely as can be."""

    def rank(item: pytest.Item) -> int:
        name = item.path.name
        return 1 + LAST.index(name) if item.path.parent.name == "local" and name in LAST else 0

    items.sort(key=rank)


@pytest.fixture(scope="module")
def pd_stack() -> Stack:
    """The running stack with prefill and decode servers; stood up for them if it is not."""
    if Stack.load().scenario != PD.name:
        done = llmtrace("up", "-e", f"scenario={PD.name}")
        assert done.returncode == 0, done.stdout + done.stderr
    return Stack.load()
