"""Scaling decisions as traces: the embedded scaler, which applies the HorizontalPodAutoscaler's rules to a local stack."""
