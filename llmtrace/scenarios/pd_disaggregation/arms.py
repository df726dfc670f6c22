"""The scenario's name and its arms: three gateways that differ in who decides."""

from __future__ import annotations

NAME = "pd-disaggregation"
BY_THRESHOLD = "by-threshold"
ALWAYS_SPLIT = "always-split"
NEVER_SPLIT = "never-split"
ARMS = (BY_THRESHOLD, ALWAYS_SPLIT, NEVER_SPLIT)
