"""Settings of the tests on the local stack."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("engine_servers", "engine_trees", "engine_workload")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Conformance comes last: it looks at everything that the other tests left in the store."""
    items.sort(key=lambda item: item.path.name == "test_conformance.py" and item.path.parent.name == "local")
