"""What the playbooks' modules and ``llmtrace up | down | status | doctor`` share."""
