"""Losses as pure functions: tensors in, a scalar out."""
