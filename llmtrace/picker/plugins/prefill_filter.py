"""prefill-filter: keeps the endpoints that serve prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters
from llmtrace.picker.plugins.by_label_filter import ROLE_LABEL, with_label
from llmtrace.picker.request import InferenceRequest

ROLES = frozenset({"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"})


@REGISTRY.register
class PrefillFilter(Filter[Parameters]):
    """Keeps endpoints by their role; unlike decode-filter, none without it."""

    type: ClassVar[str] = "prefill-filter"

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Keep prefill servers."""
        return with_label(endpoints, ROLE_LABEL, ROLES, unlabelled=False)
