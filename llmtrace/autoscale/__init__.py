"""Scaling decisions as traces.

The embedded scaler, which applies the HorizontalPodAutoscaler's rules to a local stack.
"""
