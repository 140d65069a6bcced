"""Golden artifacts: what the pipeline makes on tiny models, kept as plain values."""
