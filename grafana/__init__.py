"""Grafana dashboards as Python: what they show, and how their JSON is made.

A file in :mod:`grafana.dashboards` is a dashboard. ``make generate`` writes the JSON under ``generated/``.
"""
