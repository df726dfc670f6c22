"""What tracing costs an inference server: see docs/overhead.md."""
