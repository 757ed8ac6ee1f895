"""Model families, one folder each: ``config`` (geometry, tensors, values, expansion) and ``mixer`` (forward)."""
