"""What is checked of the manifests without a cluster: that they build, fit the schemas, and keep the policies."""
