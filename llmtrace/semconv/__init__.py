"""Names: spans, attributes, headers, metrics. Each is written once, here."""
