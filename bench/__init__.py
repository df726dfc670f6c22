"""Measurements; each module prints its numbers."""
