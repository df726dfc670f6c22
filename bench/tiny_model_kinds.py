"""The mixtures of experts that ``tiny_model.py`` writes."""

EXPERTS, CHOICES = 8, 2
EVEN, ODD = (0, 2), (1, 3)
"""Experts to which the skewed router sends a token; all of them on the first of two expert-parallel ranks."""
