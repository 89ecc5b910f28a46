"""Numbers about models: bytes, time, scores, drift, and what an imagined model would take."""
