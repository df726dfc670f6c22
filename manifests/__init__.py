"""Kubernetes manifests for kustomize, and what checks them."""
