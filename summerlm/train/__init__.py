"""Training: one run, from batches to weights."""
