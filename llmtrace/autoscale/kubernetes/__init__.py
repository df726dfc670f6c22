"""Scaling decisions of a Kubernetes cluster as traces: watches the scalers, and scales nothing."""
