"""Text and tokens: exact bytes, whole characters, stop strings. Knows nothing of models, requests or the wire."""
