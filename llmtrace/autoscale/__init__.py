"""Scaling decisions as traces.

The embedded scaler, which applies the HorizontalPodAutoscaler's rules to a local stack; and, in ``kubernetes``, the
watcher of a cluster's scalers. Both record a decision in the same shape and send it in the same way.
"""
