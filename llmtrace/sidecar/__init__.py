"""The embedded P/D sidecar: a stand-in for llm-d's disaggregation sidecar, with its nixlv2 protocol and spans."""
