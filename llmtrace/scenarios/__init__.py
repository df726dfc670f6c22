"""Scenarios: a workload, the trace it must produce, and the answer computed from traces."""
