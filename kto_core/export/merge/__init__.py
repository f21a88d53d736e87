"""Merging: which tensors, tensor by tensor or the model whole, and how sums are rounded."""
