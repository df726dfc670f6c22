"""decode-filter: keeps the endpoints that serve decode, and those that say nothing of their role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmtrace.picker.endpoints import Endpoint
from llmtrace.picker.plugin import REGISTRY, Filter, Parameters
from llmtrace.picker.plugins.by_label_filter import ROLE_LABEL, with_label
from llmtrace.picker.request import InferenceRequest

ROLES = frozenset({"decode", "prefill-decode", "both", "encode-prefill-decode"})


@REGISTRY.register
class DecodeFilter(Filter[Parameters]):
    """Keeps endpoints by their role."""

    type: ClassVar[str] = "decode-filter"

    def filter(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Keep decode servers."""
        return with_label(endpoints, ROLE_LABEL, ROLES, unlabelled=True)
